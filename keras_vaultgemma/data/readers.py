"""Readers of data files and of tables in memory: records, and where each of them stands."""

import csv
import functools
import json
import re
from collections.abc import Mapping

from keras_vaultgemma.data.containers import (
    as_list,
    as_plain,
    column_names,
    is_chat,
    read_columns,
)


def read_file(path):
    """Read the records of a data file, in UTF-8.

    - `.txt`: texts that are separated by blank lines, or, in a file without blank lines, one text a
      line. Their column is "text".
    - `.jsonl`: an object a line, whose keys are the columns.
    - `.json`: an array of objects or of texts, or an object a line.
    - `.csv` and `.tsv`: with a header, whose names are the columns.

    Args:
        path: `pathlib.Path`.

    Returns:
        List of tuples `(place, record)`. `place` is a string, such as "line 3", counted from 1;
        `record` is a dict.

    Raises:
        ValueError: If the file is of another kind, is not UTF-8 or is malformed.
        OSError: If the file cannot be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"Data must be a file named {', '.join(READERS)}, or a table in memory, such as "
            f"`pandas.read_parquet(path)` returns. Received: {path}"
        )
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error


def read_table(data, wanted):
    """Read the records of a table, a column or a stream in memory.

    Args:
        data: as `fit` takes it: a table, a column of texts or chats, or a stream of them, of rows
            or of batches.
        wanted: names of columns. The others of a table are not read if it has one of these.

    Returns:
        List of tuples `(place, record)`, as `read_file` returns it; rows are counted from 0. Texts
        have the column "text", and chats "messages".
    """
    return [(f"row {i}", row) for i, row in enumerate(_rows(data, set(wanted)))]


def _rows(x, wanted):
    x = as_list(x)
    names = column_names(x)
    if names:
        names = [name for name in names if name in wanted] or names
        columns = [as_list(column) for column in read_columns(x, names)]
        is_row = isinstance(x, Mapping) and (
            is_chat(columns[0]) or not isinstance(columns[0], (list, tuple))
        )
        columns = [[column] for column in columns] if is_row else columns
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))
    elif is_chat(x) or isinstance(x, Mapping):
        yield {"messages": x}
    elif isinstance(x, (str, bytes)) or not hasattr(x, "__iter__"):
        yield {"text": x}
    else:
        if isinstance(x, (list, tuple)):
            as_plain([x] if isinstance(x, tuple) else x)  # Raises for pairs of strings.
        for element in x:
            yield from _rows(element, wanted)


def _read_text(path):
    text = path.read_text(encoding="utf-8-sig").strip("\n")
    parts = [part for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
    if len(parts) == 1:
        parts = parts[0].strip("\n").split("\n")
    return [(None, {"text": part.strip("\n")}) for part in parts]


def _read_json(path):
    with path.open(encoding="utf-8-sig") as file:
        try:
            records = json.load(file)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                return _read_json_lines(path)
            raise ValueError(f"{path}: not JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(
            f"{path} must hold an array of objects or of texts, or an object a line. "
            f"Received: {json.dumps(records)[:100]}"
        )
    records = [{"text": record} if isinstance(record, str) else record for record in records]
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, record {number}: must be an object. Received: {str(record)[:100]}"
            )
    return [(f"record {number}", record) for number, record in enumerate(records, 1)]


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
            yield f"line {number}", record


def _read_csv(path, dialect="excel"):
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, dialect=dialect, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: must have {len(reader.fieldnames)} "
                        "values, like the header"
                    )
                yield f"line {reader.line_num}", record
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


READERS = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, dialect="excel-tab"),
}
