"""Records to measure on, as token ids: from strings, or from ids themselves."""

import zlib
from typing import NamedTuple

import numpy as np

from keras_vaultgemma.data.containers import as_list
from keras_vaultgemma.data.text_inputs import check_unicode
from keras_vaultgemma.data.token_ids import check_ids


class Texts(NamedTuple):
    """Records as rows of token ids.

    Attributes:
        rows: list of lists of ints. Ids without `<bos>` and `<eos>`, at least one each.
        contents: list of bytes. What zlib compresses: the text in UTF-8.
        empty: int. Number of records without a token.
        undecodable: int. Number of records that are not valid UTF-8.
    """

    rows: list
    contents: list
    empty: int = 0
    undecodable: int = 0


def read_texts(records, model, name="records"):
    """Tokenize records. Empty ones and those that are no valid UTF-8 are left out and counted.

    Args:
        records: sequence of strings, or of sequences of token ids.
        model: `VaultGemmaCausalLM`. Its tokenizer is used for strings.
        name: string. Name of the argument, for messages. Defaults to "records".

    Returns:
        `Texts`.

    Raises:
        ValueError: If `records` are neither strings nor ids, or an id is outside the vocabulary.
    """
    records = as_list(records)
    if isinstance(records, (str, bytes)) or not hasattr(records, "__len__"):
        raise ValueError(
            f"`{name}` must be a list of strings or of lists of token ids. "
            f"Received: {type(records).__name__}"
        )
    if all(isinstance(record, (str, bytes)) for record in records):
        return _tokenize(records, model, name)
    rows, empty = [], 0
    for i, record in enumerate(records):
        ids = None if isinstance(record, (str, bytes)) else np.asarray(record)
        if ids is None or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"`{name}` must be all strings or all lists of token ids. "
                f"Received: {str(record)[:100]!r} in {name}[{i}]"
            )
        check_ids(ids, model.backbone.vocabulary_size, f"Token ids of `{name}[{i}]`")
        ids = _without_special_ids(ids.tolist(), model)
        if len(ids) + len(special_ids(model)[0]) > 1:  # something can be predicted
            rows.append(ids)
        else:
            empty += 1
    return Texts(rows, contents_of(rows, model), empty)


def _tokenize(records, model, name):
    if len(records) and model.preprocessor is None:
        raise ValueError(
            f"`{name}` must be lists of token ids if the model has no preprocessor. "
            "Received: strings"
        )
    texts, empty, undecodable = [], 0, 0
    for record in records:
        try:
            text = record.decode() if isinstance(record, bytes) else record
            check_unicode(text, "A record")
        except ValueError:
            undecodable += 1
            continue
        if text.strip():
            texts.append(text)
        else:
            empty += 1
    rows = [list(row) for row in model.preprocessor.tokenizer.tokenize(texts)] if texts else []
    return Texts(rows, [text.encode() for text in texts], empty, undecodable)


def training_rows(texts, model):
    """Return rows of ids as a model is trained on them.

    Args:
        texts: `Texts`.
        model: `VaultGemmaCausalLM`.

    Returns:
        Tuple `(rows, contents, truncated)`: N lists of ids with `<bos>` and `<eos>`, no longer than
        the preprocessor's rows; N bytes, the text in them; and the number of truncated rows.
    """
    start, end = special_ids(model)
    # One id more than inputs, because the last one is only a label.
    longest = model.backbone.max_sequence_length + 1
    if model.preprocessor is not None:
        longest = min(longest, model.preprocessor.sequence_length + 1)
    rows, contents, truncated = [], [], 0
    for ids, content in zip(texts.rows, texts.contents, strict=True):
        row = [*start, *ids, *end]
        if len(row) > longest:
            row, truncated = row[:longest], truncated + 1
            content = contents_of([row[len(start) :]], model)[0]
        rows.append(row)
        contents.append(content)
    return rows, contents, truncated


def _without_special_ids(ids, model):
    start, end = special_ids(model)
    ids = ids[len(start) :] if start and ids[: len(start)] == start else ids
    return ids[: -len(end)] if end and ids[-len(end) :] == end else ids


def special_ids(model):
    """Return the lists of ids that the model's training rows begin with and end with."""
    return ([], []) if model.preprocessor is None else model.preprocessor.special_ids


def contents_of(rows, model):
    """Return the texts of rows of ids in UTF-8, or the ids' own bytes without a tokenizer."""
    if model.preprocessor is None:
        return [np.asarray(row, "<u4").tobytes() for row in rows]
    return [text.encode("utf-8", "replace") for text in model.preprocessor.detokenize(rows)]


def compressed_size(content):
    """Return the number of bytes that zlib compresses bytes to."""
    return len(zlib.compress(content, 9))
