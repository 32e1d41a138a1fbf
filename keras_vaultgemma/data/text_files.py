"""Training records from data files: texts, or prompts and responses."""

import csv
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_vaultgemma.data import packing
from keras_vaultgemma.data.fit_inputs import TruncationCounter, drop_rows_without_labels

HELD_OUT_EVERY, MAX_HELD_OUT = 10, 100
"""One record in this many is held out, and at most this many records."""


class TextRecords(NamedTuple):
    """Training records of one kind: texts, or prompts and responses.

    Attributes:
        texts: list of strings, none of them blank. Whole texts, or the responses to `prompts`.
        prompts: list of as many strings, or None.
        blank: int. Number of records that were left out because their text or response was blank.
        groups: list of as many strings, the labels of the users whose records they are, or None.
    """

    texts: list
    prompts: list | None
    blank: int = 0
    groups: list | None = None

    @property
    def samples(self):
        """The records in the form that `VaultGemmaCausalLM.fit` takes."""
        if self.prompts is None:
            return self.texts
        return {"prompts": self.prompts, "responses": self.texts}

    def split(self):
        """Hold out every tenth record, but at most 100, evenly spread.

        With `groups`, all records of every tenth user, but of at most 100, are held out.

        Returns:
            Tuple `(training, held_out)` of `TextRecords`.

        Raises:
            ValueError: If there are fewer than two records.
        """
        owners = range(len(self.texts)) if self.groups is None else self.groups
        users = [*dict.fromkeys(owners)]
        if len(users) < 2:
            kind = "record" if self.groups is None else "user"
            raise ValueError(
                f"Data must have at least 2 {kind}s, one of which is held out, or `validation` "
                f"must name a file of its own. Received: {len(users)} {kind}"
            )
        count = min(max(1, len(users) // HELD_OUT_EVERY), MAX_HELD_OUT)
        spread = ((np.arange(count) + 0.5) * len(users) / count).astype(int).tolist()
        held_out = {users[i] for i in spread}
        training = [i for i, owner in enumerate(owners) if owner not in held_out]
        unseen = [i for i, owner in enumerate(owners) if owner in held_out]
        return self._select(training), self._select(unseen)

    def _select(self, indices):
        prompts = None if self.prompts is None else [self.prompts[i] for i in indices]
        groups = None if self.groups is None else [self.groups[i] for i in indices]
        return TextRecords([self.texts[i] for i in indices], prompts, groups=groups)

    def tokenize(self, preprocessor, packed, truncations=None):
        """Return token ids and labels, without rows that have no label unless there are `groups`.

        Args:
            preprocessor: `VaultGemmaCausalLMPreprocessor`, whose `sequence_length` is T.
            packed: bool. If True, texts share full rows (see `packing`) and none is truncated. A
                prompt and its response always have a row of their own.
            truncations: `TruncationCounter` that counts truncated rows. Defaults to one that warns
                of them at once.

        Returns:
            Dict of the arguments `x` (a dict of `token_ids` and `padding_mask`), `y` and
            `sample_weight` of `fit`. All arrays are NumPy int32 of shape `[B, T]`.
        """
        if packed and self.prompts is None:
            batches = packing.batches(self.texts, preprocessor, batch_size=64)
            inputs, labels, label_weights = zip(*batches, strict=True)
            x = {name: np.concatenate([batch[name] for batch in inputs]) for name in inputs[0]}
            y, weights = np.concatenate(labels), np.concatenate(label_weights)
        else:
            counter = TruncationCounter() if truncations is None else truncations
            x, y, weights = preprocessor.call(self.samples, truncations=counter)
            if truncations is None:
                counter.report()
            if self.groups is None:
                x, y, weights = drop_rows_without_labels(x, y, weights)
        return {"x": x, "y": y, "sample_weight": weights}


def read_records(
    path, text_column=None, prompt_column=None, response_column=None, group_column=None
):
    """Read a data file, in UTF-8.

    - `.txt`: texts that are separated by blank lines.
    - `.jsonl`: one object per line, whose keys are the columns.
    - `.csv`: with a header, whose names are the columns.

    Args:
        path: `pathlib.Path` or string.
        text_column: string. Column of texts to train on. Defaults to "text" if there is such a
            column and no column is named.
        prompt_column: string. Column of prompts. Defaults to "prompt" if only `response_column` is
            named, or if there are both default columns and no column is named.
        response_column: string. Column of responses to train on. Defaults to "response" likewise.
        group_column: string. Column of strings or integers, the labels of the users whose records
            they are. Defaults to None.

    Returns:
        `TextRecords`.

    Raises:
        ValueError: If the file is of another kind, malformed or empty, lacks a column (the message
            lists those that it has), has a value that is no string, or if columns of both kinds are
            named. Lines are counted from 1.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"Data must be a file named {', '.join(READERS)}. Received: {path}")
    if text_column is not None and (prompt_column is not None or response_column is not None):
        raise ValueError(
            "Data must be one column of texts, or two columns of prompts and responses. "
            f"Received: text_column={text_column!r}, prompt_column={prompt_column!r}, "
            f"response_column={response_column!r}"
        )
    named = [name for name in (text_column, prompt_column, response_column) if name is not None]
    try:
        records = list(READERS[path.suffix](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    if not records:
        raise ValueError(f"{path} must have at least one record. Received: none")
    if path.suffix == ".txt":
        named += [] if group_column is None else [group_column]
        if named:
            raise ValueError(
                f"{path} has no columns; only .jsonl and .csv files do. Received: {named}"
            )
        return TextRecords([text for _, text in records], None)
    if text_column is not None:
        columns = [text_column]
    elif named:
        columns = [prompt_column or "prompt", response_column or "response"]
    else:
        columns = _default_columns(path, records[0][1])
    values = [
        [_value(path, line, record, column) for column in columns] for line, record in records
    ]
    is_filled = [bool(row[-1].strip()) for row in values]
    filled = [*itertools.compress(values, is_filled)]
    if not filled:
        raise ValueError(
            f"{path} must have a record whose {columns[-1]!r} is not blank. "
            f"Received: {len(values)} blank records"
        )
    return TextRecords(
        [row[-1] for row in filled],
        None if len(columns) == 1 else [row[0] for row in filled],
        len(values) - len(filled),
        None
        if group_column is None
        else [
            _label(path, line, record, group_column)
            for line, record in itertools.compress(records, is_filled)
        ],
    )


def _default_columns(path, record):
    for columns in (["text"], ["prompt", "response"]):
        if set(columns) <= record.keys():
            return columns
    raise ValueError(
        f"{path} must have a column 'text', or 'prompt' and 'response', unless `text_column`, or "
        "`prompt_column` and `response_column`, name others. "
        f"Received: the columns {list(record)}"
    )


def _check_column(path, line, record, column):
    if column not in record:
        raise ValueError(
            f"{path}, line {line}: there is no column {column!r}. "
            f"Received: the columns {list(record)}"
        )


def _label(path, line, record, column):
    _check_column(path, line, record, column)
    label = record[column]
    if type(label) not in (str, int) or not str(label).strip():
        raise ValueError(
            f"{path}, line {line}: {column!r} must be a string or an integer that is not blank, "
            f"because every row must belong to a user. Received: {label!r}"
        )
    return str(label).strip()


def _value(path, line, record, column):
    _check_column(path, line, record, column)
    if not isinstance(record[column], str):
        raise ValueError(
            f"{path}, line {line}: {column!r} must be a string. Received: {record[column]!r}"
        )
    # Windows line breaks are other tokens, which the model should not be trained on.
    return record[column].replace("\r\n", "\n")


def _read_text(path):
    text = path.read_text(encoding="utf-8-sig")
    return [(None, part.strip("\n")) for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]


def _read_json_lines(path):
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}, line {number}: must be an object. Received: {line.strip()[:100]}"
                )
            yield number, record


def _read_csv(path):
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: must have {len(reader.fieldnames)} "
                        "values, like the header"
                    )
                yield reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


READERS = {".txt": _read_text, ".jsonl": _read_json_lines, ".csv": _read_csv}
