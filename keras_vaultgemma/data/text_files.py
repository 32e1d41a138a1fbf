"""Training records from data files and tables: texts, prompts and responses, or chats."""

import contextlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_vaultgemma.data import packing
from keras_vaultgemma.data.containers import CHATS, COLUMNS, as_chat, is_chat
from keras_vaultgemma.data.fit_inputs import TruncationCounter, drop_rows_without_labels
from keras_vaultgemma.data.readers import read_file, read_table
from keras_vaultgemma.data.text_inputs import as_samples

HELD_OUT_EVERY, MAX_HELD_OUT = 10, 100
"""One record in this many is held out, and at most this many records."""


class TextRecords(NamedTuple):
    """Training records of one kind: texts, prompts and responses, or chats.

    Attributes:
        texts: list of strings, none of them blank, or of chats. Whole texts, or the responses to
            `prompts`.
        prompts: list of as many strings or chats, or None.
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
                prompt and its response always have a row of their own, and so has a chat.
            truncations: `TruncationCounter` that counts truncated rows. Defaults to one that warns
                of them at once.

        Returns:
            Dict of the arguments `x` (a dict of `token_ids` and `padding_mask`), `y` and
            `sample_weight` of `fit`. All arrays are NumPy int32 of shape `[B, T]`.
        """
        if packed and self.prompts is None and isinstance(self.texts[0], str):
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
    data, text_column=None, prompt_column=None, response_column=None, group_column=None
):
    """Read the records of a data file or of a table in memory.

    Args:
        data: `pathlib.Path` or string of a file, as `readers.read_file` takes it, or data in
            memory, as `readers.read_table` takes it.
        text_column: string. Column of texts or chats to train on. Defaults to "text" or "messages"
            if there is such a column and no column is named.
        prompt_column: string. Column of prompts, which are strings or lists of messages. Defaults
            to "prompt" if only `response_column` is named, or if there are "prompt" and "response"
            or "completion" and no column is named.
        response_column: string. Column of responses to train on. Defaults to "response" if only
            `prompt_column` is named, and to "response" or "completion" likewise.
        group_column: string. Column of strings or integers, the labels of the users whose records
            they are. Defaults to None.

    Returns:
        `TextRecords`.

    Raises:
        ValueError: If the file is of another kind, malformed or empty, lacks a column (the message
            lists those that it has), has a value that is no string or chat, or if columns of both
            kinds are named. Lines are counted from 1.
        OSError: If the file cannot be read.
    """
    if text_column is not None and (prompt_column is not None or response_column is not None):
        raise ValueError(
            "Data must be one column of texts, or two columns of prompts and responses. "
            f"Received: text_column={text_column!r}, prompt_column={prompt_column!r}, "
            f"response_column={response_column!r}"
        )
    named = [name for name in (text_column, prompt_column, response_column) if name is not None]
    labels = [] if group_column is None else [group_column]
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        source, records = str(path), read_file(path)
        if path.suffix.lower() == ".txt" and records and named + labels:
            raise ValueError(
                f"{path} has no columns; only the files of other kinds do. "
                f"Received: {named + labels}"
            )
    else:
        wanted = itertools.chain(named, labels, *COLUMNS)
        source, records = "The data", read_table(data, wanted)
    if not records:
        raise ValueError(f"{source} must have at least one record. Received: none")
    if text_column is not None:
        columns = [text_column]
    elif named:
        columns = [prompt_column or "prompt", response_column or "response"]
    else:
        columns = _default_columns(source, records[0][1])
    values = [_sample(source, place, record, columns) for place, record in records]
    is_filled = [not isinstance(row[-1], str) or bool(row[-1].strip()) for row in values]
    filled = [*itertools.compress(values, is_filled)]
    if not filled:
        raise ValueError(
            f"{source} must have a record whose {columns[-1]!r} is not blank. "
            f"Received: {len(values)} blank records"
        )
    for row, (place, _) in zip(filled, itertools.compress(records, is_filled), strict=True):
        if isinstance(row[-1], str) != isinstance(filled[0][-1], str):
            raise ValueError(
                f"{source}, {place}: {columns[-1]!r} must be of one kind in all records, strings "
                f"or lists of messages. Received: {str(row[-1])[:100]}"
            )
    return TextRecords(
        [row[-1] for row in filled],
        None if len(columns) == 1 else [row[0] for row in filled],
        len(values) - len(filled),
        None
        if group_column is None
        else [
            _label(source, place, record, group_column)
            for place, record in itertools.compress(records, is_filled)
        ],
    )


def _default_columns(source, record):
    for columns in COLUMNS:
        if set(columns) <= record.keys():
            return columns
    raise ValueError(
        f"{source} must have a column 'text', or 'prompt' and 'response' or 'completion', or "
        "'messages', unless `text_column`, or `prompt_column` and `response_column`, name others. "
        f"Received: the columns {list(record)}"
    )


def _check_column(source, place, record, column):
    if column not in record:
        raise ValueError(
            f"{source}, {place}: there is no column {column!r}. "
            f"Received: the columns {list(record)}"
        )


def _label(source, place, record, column):
    _check_column(source, place, record, column)
    label = record[column]
    if type(label) not in (str, int) or not str(label).strip():
        raise ValueError(
            f"{source}, {place}: {column!r} must be a string or an integer that is not blank, "
            f"because every row must belong to a user. Received: {label!r}"
        )
    return str(label).strip()


def _sample(source, place, record, columns):
    """Return the values of a record's columns, strings or chats, as a list."""
    for column in columns:
        _check_column(source, place, record, column)
    row = [_value(record[column]) for column in columns]
    for column, value in zip(columns, row, strict=True):
        if not is_chat(value) and (column in CHATS or not isinstance(value, str)):
            kind = "a list of messages" if column in CHATS else "a string"
            raise ValueError(
                f"{source}, {place}: {column!r} must be {kind}. Received: {record[column]!r}"
            )
    if not all(isinstance(value, str) for value in row):
        try:  # as `fit` will take it
            as_samples(row[0] if len(row) == 1 else {"prompts": row[0], "responses": row[1]})
        except ValueError as error:
            raise ValueError(f"{source}, {place}: {error}") from error
    return row


def _value(value):
    """Return a string or a chat with the line breaks of Unix, and anything else unchanged.

    Those of Windows are other tokens, which the model should not be trained on.
    """
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            value = value.decode("utf-8")
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    value = as_chat(value)
    if not is_chat(value) or not all(isinstance(message, Mapping) for message in value):
        return value
    return [{name: _value(part) for name, part in message.items()} for message in value]
