"""The rows of a data file: texts to learn, or prompts with the responses to learn."""

import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_vaultgemma.data import packing
from keras_vaultgemma.data.fit_inputs import TruncationCounter

HELD_OUT_PART, HELD_OUT_ROWS = 10, 100
"""One row in so many is held out, and no more rows than so many."""


class TextRecords(NamedTuple):
    """Rows of one kind.

    Attributes:
        texts: list of strings, none of them blank: whole texts, or responses where there are prompts.
        prompts: list of as many strings, or None.
        blank: how many rows had a blank text or response and were left out.
    """

    texts: list
    prompts: list | None
    blank: int = 0

    @property
    def samples(self):
        """The rows as `VaultGemmaCausalLM.fit` takes them."""
        return (
            self.texts
            if self.prompts is None
            else {"prompts": self.prompts, "responses": self.texts}
        )

    def split(self):
        """(rows to train on, rows to hold out): every tenth is held out, at most 100 of them, evenly spread.

        Raises:
            ValueError: where there are not two rows.
        """
        if len(self.texts) < 2:
            raise ValueError(
                "Data must have 2 rows or more, of which one is held out, or `validation` must name a file of its own. "
                f"Received: {len(self.texts)} row"
            )
        count = min(max(1, len(self.texts) // HELD_OUT_PART), HELD_OUT_ROWS)
        held_out = set(((np.arange(count) + 0.5) * len(self.texts) / count).astype(int).tolist())
        indices = range(len(self.texts))
        return self._take([i for i in indices if i not in held_out]), self._take(sorted(held_out))

    def _take(self, indices):
        prompts = None if self.prompts is None else [self.prompts[i] for i in indices]
        return TextRecords([self.texts[i] for i in indices], prompts)

    def tokenize(self, preprocessor, packed):
        """Ids and labels, with a warning that says how many rows were cut.

        Args:
            preprocessor: `VaultGemmaCausalLMPreprocessor`, whose `sequence_length` T is that of the result.
            packed: whether texts follow one another in full rows (packing.py), which cuts none. Pairs have a row each.

        Returns:
            `{"x": {"token_ids", "padding_mask"}, "y", "sample_weight"}` for `fit`, NumPy int32 [B, T].
        """
        if packed and self.prompts is None:
            batches = list(packing.batches(self.texts, preprocessor, batch_size=64))
            x = {name: np.concatenate([x[name] for x, _, _ in batches]) for name in batches[0][0]}
            y, weights = (np.concatenate([batch[i] for batch in batches]) for i in (1, 2))
        else:
            with TruncationCounter() as truncations:
                pairs = {"prompts": self.prompts, "responses": self.texts}
                x, y, weights = preprocessor.call(
                    self.texts if self.prompts is None else pairs, truncations=truncations
                )
        return {"x": x, "y": y, "sample_weight": weights}


def read_records(path, text_column=None, prompt_column=None, response_column=None):
    """Read a data file, in UTF-8.

    - `.txt`: each text ends at a blank line.
    - `.jsonl`: an object a line, whose keys are the columns; a text may have blank lines in it.
    - `.csv`: with a header, whose names are the columns.

    Args:
        path: of the file.
        text_column: of texts to learn; "text" where there is such a column and none is named.
        prompt_column, response_column: of pairs, of which the response is learnt; "prompt" and "response" where only
            one of the two is named, or where there are such columns and none is named.

    Returns:
        `TextRecords`.

    Raises:
        ValueError: for a file that is of another kind, has no row or is malformed, for a column that it has not (with
            those that it has), for columns of both kinds, or a value that is no string. Lines count from 1.
        OSError: where it cannot be read.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"Data must be a file named {', '.join(READERS)}. Received: {path}")
    if text_column is not None and (prompt_column is not None or response_column is not None):
        raise ValueError(
            "Data must be one column of texts, or two of prompts and responses. Received: "
            f"text_column={text_column!r}, prompt_column={prompt_column!r}, response_column={response_column!r}"
        )
    named = [name for name in (text_column, prompt_column, response_column) if name is not None]
    try:
        records = list(READERS[path.suffix](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    if not records:
        raise ValueError(f"{path} must have one row or more. Received: none")
    if path.suffix == ".txt":
        if named:
            raise ValueError(
                f"{path} has no columns; those of .jsonl and .csv files have names. Received: {named}"
            )
        return TextRecords([text for _, text in records], None)
    if named:
        columns = (
            [text_column]
            if text_column is not None
            else [prompt_column or "prompt", response_column or "response"]
        )
    else:
        columns = _default_columns(path, records[0][1])
    values = [
        [_value(path, line, record, column) for column in columns] for line, record in records
    ]
    kept = [row for row in values if row[-1].strip()]
    if not kept:
        raise ValueError(
            f"{path} must have a row whose {columns[-1]!r} is not blank. Received: {len(values)} blank rows"
        )
    return TextRecords(
        [row[-1] for row in kept],
        None if len(columns) == 1 else [row[0] for row in kept],
        len(values) - len(kept),
    )


def _default_columns(path, record):
    for columns in (["text"], ["prompt", "response"]):
        if set(columns) <= record.keys():
            return columns
    raise ValueError(
        f"{path} has no column 'text', and no 'prompt' and 'response': name what to learn with `text_column`, or with "
        f"`prompt_column` and `response_column`. It has the columns {list(record)}"
    )


def _value(path, line, record, column):
    if column not in record:
        raise ValueError(
            f"{path}, line {line}: there is no column {column!r}. It has the columns {list(record)}"
        )
    if not isinstance(record[column], str):
        raise ValueError(
            f"{path}, line {line}: {column!r} must be a string. Received: {record[column]!r}"
        )
    # Line breaks of one kind: a file for Windows would teach the model another.
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
                        f"{path}, line {reader.line_num}: must have {len(reader.fieldnames)} values, as the header has"
                    )
                yield reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


READERS = {".txt": _read_text, ".jsonl": _read_json_lines, ".csv": _read_csv}
