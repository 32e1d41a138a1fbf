"""Tables, columns and rows of other libraries as plain lists, without importing those libraries.

A table is a pandas or polars `DataFrame`, an Arrow table, a Hugging Face `Dataset`, a dict of
columns, or a list of dicts. Its columns have the names that Hugging Face's TRL uses.
"""

import math
from collections.abc import Mapping

import keras
import numpy as np

from keras_vaultgemma import backend

TEXTS, CHATS = ("text",), ("messages",)
PAIRS = (("prompts", "responses"), ("prompt", "completion"), ("prompt", "response"))
COLUMNS = (TEXTS, CHATS, *PAIRS)
"""The columns of which a table has one group: texts, chats, or what is given and what follows."""

_TABLES = {"datasets", "pandas", "polars", "pyarrow"}
_KNOWN = (str, bytes, bytearray, list, tuple, Mapping, keras.utils.PyDataset)


def as_plain(x):
    """Return samples in a container of any library as strings, pairs or chats in lists.

    Args:
        x: a column of strings or chats, which is a list, an array, a `Series`, a Hugging Face
            `Column`, an Arrow array or another sequence; a table; or one row of it. Anything else,
            such as token ids and streams, is returned unchanged.

    Returns:
        A string or a list of them, a chat or a list of them, or a dict of `"prompts"` and
        `"responses"`, which are strings or chats. A chat is a list of messages.

    Raises:
        ValueError: If a table lacks the columns, a row lacks a value, or `x` has several splits.
    """
    x = as_list(x)
    names = column_names(x)
    if names is None or "token_ids" in names:
        return _as_chats(x)
    chosen = sample_columns(names)
    if isinstance(x, Mapping) and chosen == PAIRS[0] and len(names) > 2:
        raise _wrong_columns(names)
    columns = [as_list(column) for column in read_columns(x, chosen)]
    for name, column in zip(chosen, columns, strict=True):
        _check_values(name, column)
    columns = [_as_chats(column) for column in columns]
    return columns[0] if len(columns) == 1 else dict(zip(PAIRS[0], columns, strict=True))


def as_list(x):
    """Return a column as a list, and anything else unchanged.

    Args:
        x: an array of strings, a pandas or polars `Series`, a Hugging Face `Column`, an Arrow
            array, or another sequence. A scalar array becomes a string.
    """
    if backend.is_tensorflow(x) and hasattr(x, "numpy"):
        x = x.numpy()
    if isinstance(x, _KNOWN):
        return x
    if isinstance(x, np.ndarray):
        return x.tolist() if x.dtype.kind in "OSUT" else x
    if is_table(x) or is_stream(x):
        return x
    if _libraries(x) & _TABLES:
        for name in ("to_pylist", "to_list", "tolist"):
            if hasattr(x, name):
                return getattr(x, name)()
        if hasattr(x, "column_name"):  # A slice is read at once, and items one by one.
            return as_list(x[:])
    if hasattr(x, "dtype") or not (hasattr(x, "__len__") and hasattr(x, "__getitem__")):
        return x
    return [*x] if hasattr(x, "__iter__") else [x[i] for i in range(len(x))]


def is_table(x):
    """Return True for a `DataFrame`, an Arrow table or a Hugging Face `Dataset`."""
    libraries = _libraries(x)
    name = "column_names" if libraries & {"datasets", "pyarrow"} else "columns"
    return bool(libraries & _TABLES) and hasattr(x, name) and hasattr(x, "__len__")


def is_stream(x):
    """Return True for data that can only be read in order.

    These are iterators, and iterables without random access: a torch `DataLoader`, Grain datasets,
    a Hugging Face `IterableDataset`, a `tf.data.Dataset`, and the like.
    """
    if isinstance(x, _KNOWN) or hasattr(x, "dtype") or not hasattr(x, "__iter__"):
        return False
    is_iterable = any(base.__name__ == "IterableDataset" for base in type(x).__mro__)
    is_indexed = hasattr(x, "__len__") and hasattr(x, "__getitem__")
    return is_iterable or "grain" in _libraries(x) or not is_indexed


def is_chat(x):
    """Return True for one chat, a list of messages."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], Mapping)


def is_one_sample(x):
    """Return True for one text, pair or chat, as `as_plain` returns it, instead of a batch."""
    first = x.get("prompts") if isinstance(x, Mapping) else x
    return isinstance(first, (str, bytes)) or (is_chat(first) and not isinstance(x, tuple))


def column_names(x):
    """Return the names of the columns of a table or a row, as a list, or None for anything else."""
    if isinstance(x, Mapping):
        if "datasets" in _libraries(x) and hasattr(x, "column_names"):
            raise ValueError(
                "Data must be one split of a dataset, such as data['train']. "
                f"Received: the splits {[*x]}"
            )
        is_message = "role" in x and not any(set(columns) <= set(x) for columns in COLUMNS)
        return None if is_message else [*x]
    if is_chat(x):
        return column_names(x[0])
    if is_table(x):
        return [*(x.column_names if hasattr(x, "column_names") else x.columns)]
    return None


def sample_columns(names):
    """Return those of a table's columns that are samples, as a tuple of one or two names."""
    for columns in COLUMNS:
        if set(columns) <= set(names):
            return columns
    raise _wrong_columns(names)


def read_columns(x, names):
    """Return columns of a table, or the values of a row, as a list of `len(names)` columns."""
    if isinstance(x, Mapping):
        return [x[name] for name in names]
    if is_table(x):
        if hasattr(x, "select_columns"):
            # The others may be images, and another format would return tensors.
            x = x.select_columns([*names]).with_format(None)[:]
        return [x[name] for name in names]
    for i, row in enumerate(x):
        if not isinstance(row, Mapping) or not set(names) <= set(row):
            received = [*row] if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"Every row must have the columns {[*names]}. Received: {received} in row {i}"
            )
    return [[row[name] for row in x] for name in names]


def is_missing(value):
    """Return True for None, NaN and the missing values of pandas."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def _check_values(name, column):
    """Raise ValueError for a missing value, and for messages that are still text."""
    is_column = isinstance(column, (list, tuple)) and not (name in CHATS and is_chat(column))
    for i, value in enumerate(column if is_column else [column]):
        place = f" in row {i}, counted from 0" if is_column else ""
        if is_missing(value):
            raise ValueError(
                f"Column {name!r} must have a value in every row: leave out the others, for "
                f"example by `dropna` or `filter`. Received: {value!r}{place}"
            )
        if name in CHATS and isinstance(value, (str, bytes)):
            raise ValueError(
                f"Column {name!r} must have a list of messages in every row: parse text, for "
                f"example by `json.loads`. Received: {value[:60]!r}{place}"
            )


def _as_chats(x):
    """Return a chat or a list of chats with lists of dicts, and anything else unchanged."""
    if not isinstance(x, (list, tuple)) or not len(x):
        return as_chat(x)
    first = as_list(x[0])
    if isinstance(first, (list, tuple)) and len(first) and isinstance(first[0], (str, bytes)):
        raise ValueError(
            "Pairs must be {'prompts': [...], 'responses': [...]}, and a batch of texts one list. "
            f"Received: {str(first)[:100]} as the first sample"
        )
    if _is_of_lists(first):
        roles = [{*map(str, as_list(chat["role"]))} for chat in x[:2] if _is_of_lists(chat)]
        is_mixed = len(as_list(first["role"])) > 1 or len(set().union(*roles)) > 1
        if is_mixed and all(len(each) == 1 for each in roles):
            raise ValueError(
                "Each chat must be a list of messages. Received: a list of roles for each place in "
                "the chats, as batches are made of them: pass single rows, or `collate_fn=list` to "
                "a `DataLoader`"
            )
        return [as_chat(chat) for chat in x]
    return [as_chat(chat) for chat in x] if is_chat(first) else x


def as_chat(x):
    """Return a chat as a list of messages. It may be an array, or a dict of roles and contents."""
    x = as_list(x)
    if not _is_of_lists(x):
        return x
    pairs = zip(as_list(x["role"]), as_list(x["content"]), strict=True)
    return [{"role": role, "content": content} for role, content in pairs]


def _is_of_lists(x):
    if not isinstance(x, Mapping) or isinstance(x.get("content"), str):
        return False
    return isinstance(as_list(x.get("role")), (list, tuple))


def _wrong_columns(names):
    return ValueError(
        "Data with columns must have 'text', 'messages', 'prompt' and 'completion', 'prompt' and "
        "'response', or just the keys 'prompts' and 'responses' (token ids: 'token_ids' and "
        "'padding_mask'). Rename yours, or pass a column of texts alone. "
        f"Received: {[*names]}"
    )


def _libraries(x):
    """Return the names of the top packages that the class of `x` and its bases come from."""
    return {base.__module__.partition(".")[0] for base in type(x).__mro__}
