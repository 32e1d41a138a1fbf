"""The safetensors files of a folder, as memory-mapped arrays (format: https://github.com/huggingface/safetensors).

The library reads bfloat16 into PyTorch or JAX only; a header and a memory map serve every backend. A header is believed
only after its numbers have been checked against the file's size, so a hostile file costs no memory. Writing takes no
more memory than a block of one tensor.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from keras_vaultgemma._files import check_link, parse_json, read_json
from keras_vaultgemma.checkpoints.lazy_tensor import as_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAX_HEADER = 2**23
"""Bytes of JSON, some hundred times what this model needs: a limit on the time that a hostile header can take."""


def open_tensors(folder):
    """{name: memory-mapped NumPy array} of a folder's safetensors files; no tensor is read yet.

    Raises:
        ValueError: names the file that is missing, cut short or malformed, or the tensor that an index puts elsewhere.
    """
    folder = Path(folder)
    index = folder / INDEX
    if (
        folder / SINGLE
    ).exists() or not index.exists():  # transformers looks for the single file first, too
        return open_safetensors(folder / SINGLE)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(
            f"{index}: `weight_map` must be an object from tensor names to files. Received: {names!r}"
        )
    tensors = {}
    for file in sorted(set(map(str, names.values()))):
        if "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: files must be *.safetensors in the index's own folder. Received: {file!r}"
            )
        for name, tensor in open_safetensors(folder / file).items():
            if names.get(name) != file:
                raise ValueError(f"{index} puts {name} into {names.get(name)!r}, and {file} has it")
            tensors[name] = tensor
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{index} puts {missing[0]} into {names[missing[0]]!r}, which does not have it"
        )
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
            dtype, shape, (begin, end) = (
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
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
    for begin, next_end, name in sorted(
        spans
    ):  # the format has no gaps, so an overlap cannot hide behind one
        if begin != end:
            raise ValueError(
                f"{path}: {name} must begin at byte {end} of the data. Received: {begin}"
            )
        end = next_end
    if end != len(data):
        raise ValueError(
            f"{path} must have {end} bytes of data, and is cut short or damaged. Received: {len(data)}"
        )
    return tensors


def write_tensors(folder, tensors, dtype, shard_size, report=lambda name, count: None):
    """Write model.safetensors, or several files and their index where one would be larger than `shard_size`.

    Args:
        folder: that exists.
        tensors: list of (`Place`, `StoredTensor`), in the order to write.
        dtype: NumPy dtype to write.
        shard_size: bytes of tensors in one file at most; a tensor that is larger gets a file of its own.
        report: called with a tensor's name and the bytes that were written, after each block.
    """
    shards, room = [[]], shard_size
    for place, stored in tensors:
        size = dtype.itemsize * math.prod(place.shape)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append((place, stored))
        room -= size
    if len(shards) == 1:
        return write_safetensors(Path(folder) / SINGLE, shards[0], dtype, report)
    names = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        names |= {place.name: file for place, _ in shard}
        write_safetensors(Path(folder) / file, shard, dtype, report)
    total = sum(dtype.itemsize * math.prod(place.shape) for place, _ in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path, tensors, dtype, report=lambda name, count: None):
    """Write one file; the arguments are those of `write_tensors`."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for place, _ in tensors:
        begin, end = end, end + dtype.itemsize * math.prod(place.shape)
        header[place.name] = {
            "dtype": code,
            "shape": list(place.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors lie at multiples of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place, stored in tensors:
            for block in stored.blocks(place, dtype):
                file.write(as_bytes(block))
                report(place.name, block.nbytes)


def _read_header(path):
    """(header without its metadata, the mapped bytes after it)."""
    check_link(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is cut short or no safetensors file: {size} bytes, a header of {length}"
            )
        if length > MAX_HEADER:
            raise ValueError(
                f"{path}: the header must have at most {MAX_HEADER} bytes. Received: {length}"
            )
        header = parse_json(file.read(length), f"The header of {path}")
    header.pop("__metadata__", None)
    return header, np.memmap(path, mode="r", offset=8 + length) if size > 8 + length else np.empty(
        0, "uint8"
    )
