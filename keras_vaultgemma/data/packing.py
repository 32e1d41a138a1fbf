"""Packing of documents into full rows, so that no token is spent on padding.

Documents follow one another in order, each as `<bos> ids <eos>`, and every packed row takes the
next `sequence_length` tokens. A document that does not fit continues in the next row. There it is
a segment of its own, at positions from 0, and does not attend to its part in the previous row; but
the last token of a row still predicts the first token of the next, if both belong to the same
document. So every token of a document but its first is a label exactly once, wherever rows end.
Only the last row has padding.

`padding_mask` holds the number of each token's segment in its row, from 1, and 0 at padding. The
backbone keeps segments apart by it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma._validation import check_integer
from keras_vaultgemma.data.containers import as_list, as_plain, is_chat
from keras_vaultgemma.data.token_ids import check_ids

if TYPE_CHECKING:
    from keras_vaultgemma.models.preprocessor import VaultGemmaCausalLMPreprocessor


CONTENT = "SHA-256 of the packed rows"


def batches(
    documents: Iterable,
    preprocessor: "VaultGemmaCausalLMPreprocessor",
    batch_size: int,
    sequence_length: int | None = None,
) -> Iterator[tuple]:
    """Pack documents into batches as they are read.

    The same documents give the same batches.

    Args:
        documents: iterable of strings, or of lists of token ids without `<bos>` and `<eos>`; or a
            column, a table with the column "text", or a stream of them or of batches of them, as
            for `fit`.
        preprocessor: `VaultGemmaCausalLMPreprocessor`.
        batch_size: int. Rows of a batch, B. The last batch may have fewer.
        sequence_length: int. Tokens of a row, T. Defaults to that of the preprocessor.

    Returns:
        Iterator of `(x, y, sample_weight)` for `fit`. `x` is a dict of `token_ids` and
        `padding_mask`; all arrays are NumPy int32 of shape `[B, T]`. `y` is the next token of the
        same document. Where there is none, `y` and `sample_weight` are 0.

    Raises:
        ValueError: If a size is not positive or `documents` is a single string. When they are read,
            if a document is neither a string nor ids of the vocabulary, or if there are none.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLMPreprocessor
    from keras_vaultgemma.data import packing

    preprocessor = VaultGemmaCausalLMPreprocessor.from_preset("vaultgemma_tiny")
    documents = ["The fox ran.", "The hare slept."]
    for x, y, sample_weight in packing.batches(documents, preprocessor, 2, sequence_length=8):
        print(x["token_ids"].shape)
    ```
    """
    length = preprocessor.sequence_length if sequence_length is None else sequence_length
    check_integer("batch_size", batch_size)
    check_integer("sequence_length", length)
    documents = as_plain(documents)
    if isinstance(documents, (str, bytes, dict)) or is_chat(documents):
        raise ValueError(
            "`documents` must be an iterable of strings or of lists of ids, because pairs and "
            f"chats share no rows: `fit` takes them. Received: documents={str(documents)[:200]!r}"
        )
    return _batches(documents, preprocessor, batch_size * length, length)


def _batches(documents, preprocessor, size, length):
    start, end = preprocessor.special_ids
    # Tokens that are not in a batch yet, and for each the number of its document, from 1.
    tokens, owners = [], []
    for i, document in enumerate(_unbatched(documents)):
        row = start + _token_ids(document, preprocessor.tokenizer, i) + end
        tokens += row
        owners += [i + 1] * len(row)
        # A batch needs one token more than it holds: the label of its last token.
        packed = (len(tokens) - 1) // size * size
        for first in range(0, packed, size):
            part = slice(first, first + size + 1)
            yield _batch(tokens[part], owners[part], length)
        del tokens[:packed], owners[:packed]
    if not tokens:
        raise ValueError("`documents` must have at least one document. Received: none")
    padding = -len(tokens) % length + 1
    yield _batch(
        tokens + [preprocessor.tokenizer.pad_token_id] * padding, owners + [0] * padding, length
    )


def _unbatched(documents):
    """Yield documents that may be in batches or in rows of a table."""
    if isinstance(documents, keras.utils.PyDataset):
        documents = (documents[i] for i in range(documents.num_batches))
    for document in documents:
        document = as_list(document)
        if isinstance(document, Mapping) or is_chat(document):
            document = as_plain(document)
        if isinstance(document, tuple):
            as_plain([document])  # Raises for a pair of strings.
        is_batch = isinstance(document, list) and len(document) > 0
        if is_batch and isinstance(document[0], (str, bytes)):
            yield from document
        else:
            yield document


def _token_ids(document, tokenizer, i):
    """Return the token ids of document `i`."""
    if isinstance(document, (str, bytes)):
        text = document.decode("utf-8") if isinstance(document, bytes) else document
        return tokenizer.tokenize([text])[0]
    row = np.asarray(document)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise ValueError(
            "Every document must be a string or a list of ids; `fit` takes pairs and chats. "
            f"Received: document {i} is {document!r}"
        )
    check_ids(row, tokenizer.vocabulary_size())
    return row.tolist()


def _batch(tokens, owners, length):
    """Return `(x, y, sample_weight)` of whole rows.

    Args:
        tokens: list of B * T + 1 ints. Token ids of the rows and one more token.
        owners: list of as many ints. Number of each token's document; 0 at padding.
        length: int. T.
    """
    tokens, owners = np.array(tokens, "int32"), np.array(owners, "int32")
    token_ids, next_ids = tokens[:-1].reshape(-1, length), tokens[1:].reshape(-1, length)
    owner, next_owner = owners[:-1].reshape(-1, length), owners[1:].reshape(-1, length)
    segments = np.where(owner > 0, owner - owner[:, :1] + 1, 0)
    weights = ((next_owner == owner) & (owner > 0)).astype("int32")
    return {"token_ids": token_ids, "padding_mask": segments}, next_ids * weights, weights


class PackedDataset(keras.utils.PyDataset):
    """Documents packed into full rows, as a dataset for `fit` on every backend.

    Documents are packed once, by `packing.batches`, and stay in memory (16 bytes per token).

    Args:
        documents: iterable of strings, or of lists of token ids without `<bos>` and `<eos>`; or a
            column, a table with the column "text", or a stream of them or of batches of them, as
            for `fit`.
        preprocessor: `VaultGemmaCausalLMPreprocessor`.
        batch_size: int. Rows of a batch, B. The last batch may have fewer.
        sequence_length: int. Tokens of a row, T. Defaults to that of the preprocessor.

    Raises:
        ValueError: If a size is not positive, `documents` is a single string or empty, or a
            document is neither a string nor ids of the vocabulary.

    Example:

    ```python
    from keras_vaultgemma import PackedDataset, VaultGemmaCausalLMPreprocessor

    preprocessor = VaultGemmaCausalLMPreprocessor.from_preset("vaultgemma_tiny")
    documents = ["The fox ran.", "The hare slept."]
    dataset = PackedDataset(documents, preprocessor, batch_size=2, sequence_length=8)
    x, y, sample_weight = dataset[0]
    print(len(dataset), x["token_ids"].shape)
    ```
    """

    def __init__(
        self,
        documents: Iterable,
        preprocessor: "VaultGemmaCausalLMPreprocessor",
        batch_size: int,
        sequence_length: int | None = None,
    ) -> None:
        super().__init__()
        self.batches = list(batches(documents, preprocessor, batch_size, sequence_length))

    @property
    def run_identity(self):
        """Properties by which a `TrainingCheckpoint` recognises the dataset, as a dict for JSON."""
        digest = hashlib.sha256()
        for array in keras.tree.flatten(self.batches):
            digest.update(np.ascontiguousarray(array))
        return {"items": len(self.batches), CONTENT: digest.hexdigest()}

    @property
    def run_identity_comparisons(self):
        """`{name: function(saved, current)}` of the properties that equality does not compare."""
        # Version 0.1.0 saved the number of batches alone.
        return {CONTENT: lambda saved, current: saved in ("", current)}

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def tensorflow_dataset(
    documents: Iterable,
    preprocessor: "VaultGemmaCausalLMPreprocessor",
    batch_size: int,
    sequence_length: int | None = None,
):
    """Pack documents into a `tf.data.Dataset` as they are read. TensorFlow backend only.

    Args:
        documents: iterable of strings, or of lists of token ids without `<bos>` and `<eos>`. It is
            iterated over once per epoch, so that an iterator lasts for one epoch.
        preprocessor: `VaultGemmaCausalLMPreprocessor`.
        batch_size: int. Rows of a batch, B. The last batch may have fewer.
        sequence_length: int. Tokens of a row, T. Defaults to that of the preprocessor.

    Returns:
        `tf.data.Dataset` of the batches of `packing.batches`.

    Raises:
        ValueError: On another backend, and as `packing.batches`.
    """

    def make_batches():
        return batches(documents, preprocessor, batch_size, sequence_length)

    make_batches()  # Reads no document yet, but checks the arguments.
    rows = keras.KerasTensor((None, sequence_length or preprocessor.sequence_length), "int32")
    return backend.tensorflow_dataset(
        make_batches, ({"token_ids": rows, "padding_mask": rows}, rows, rows)
    )
