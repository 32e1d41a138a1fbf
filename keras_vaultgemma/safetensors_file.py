"""The safetensors files of a folder, as memory-mapped arrays (format: https://github.com/huggingface/safetensors).

The library reads bfloat16 into PyTorch or JAX only; a header and a memory map serve every backend. A header is believed
only after its numbers have been checked against the file's size, so a hostile file costs no memory.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from keras_vaultgemma import presets

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAX_HEADER = 100_000_000
"""Bytes of JSON; the limit of the reference implementation."""


def open_tensors(folder):
    """{name: memory-mapped NumPy array} of a folder's safetensors files; no tensor is read yet.

    Raises:
        ValueError: names the file that is missing, cut short or malformed, or the tensor that an index puts elsewhere.
    """
    folder = Path(folder)
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():  # transformers looks for the single file first, too
        return open_safetensors(folder / SINGLE)
    names = presets.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: `weight_map` must be an object from tensor names to files. Received: {names!r}")
    tensors = {}
    for file in sorted(set(map(str, names.values()))):
        if "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: files must be *.safetensors in the index's own folder. Received: {file!r}")
        for name, tensor in open_safetensors(folder / file).items():
            if names.get(name) != file:
                raise ValueError(f"{index} puts {name} into {names.get(name)!r}, and {file} has it")
            tensors[name] = tensor
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{index} puts {missing[0]} into {names[missing[0]]!r}, which does not have it")
    return tensors


def open_safetensors(path):
    """{name: memory-mapped NumPy array} of one safetensors file.

    Raises:
        ValueError: names the file where it is missing, cut short or malformed, and the tensor that is to blame.
    """
    path = Path(path)
    header, data = _read_header(path)
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            fine = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            if not fine or end - begin != dtype.itemsize * math.prod(shape):
                raise ValueError
            spans.append((begin, end, name))
            if end <= len(data):
                tensors[name] = data[begin:end].view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path}: the entry of {name} must have a dtype of {', '.join(DTYPES)}, a shape and two data_offsets "
                f"that agree. Received: {str(entry)[:200]}"
            ) from error
    end = 0
    for begin, next_end, name in sorted(spans):  # the format has no gaps, so an overlap cannot hide behind one
        if begin != end:
            raise ValueError(f"{path}: {name} must begin at byte {end} of the data. Received: {begin}")
        end = next_end
    if end != len(data):
        raise ValueError(f"{path} must have {end} bytes of data, and is cut short or damaged. Received: {len(data)}")
    return tensors


def _read_header(path):
    """(header without its metadata, the mapped bytes after it)."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut short or no safetensors file: {size} bytes, a header of {length}")
        if length > MAX_HEADER:
            raise ValueError(f"{path}: the header must have at most {MAX_HEADER} bytes. Received: {length}")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} has no valid safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header must be a JSON object. Received: {type(header).__name__}")
    header.pop("__metadata__", None)
    return header, np.memmap(path, mode="r", offset=8 + length) if size > 8 + length else np.empty(0, "uint8")
