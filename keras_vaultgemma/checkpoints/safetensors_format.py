"""Safetensors files, read as memory-mapped arrays and written in blocks.

The `safetensors` library reads bfloat16 only into PyTorch or JAX tensors; a header and a memory
map serve every backend. The numbers of a header are checked against the size of the file before
anything is allocated, so that a hostile file cannot exhaust memory. Writing needs the memory of
one block of one tensor.

References:
    - [Format](https://github.com/huggingface/safetensors#format)
"""

import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from keras_vaultgemma._files import check_link, ignore_progress, parse_json, read_json
from keras_vaultgemma.checkpoints.foreign_files import QUANTIZED, explain_pointer
from keras_vaultgemma.checkpoints.lazy_tensor import as_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
}
INTEGERS_AND_FLOAT8 = re.compile("[IUF](4|8.*|16|32|64)")
"""Other dtypes of the format, in which quantized checkpoints store their weights."""

MAX_HEADER = 2**23
"""Largest header in bytes, which bounds the time that parsing a hostile file takes.

VaultGemma 1B needs about a hundredth of it."""


def open_tensors(folder):
    """Open all safetensors files of a folder, without reading any tensor.

    Args:
        folder: `pathlib.Path` or string. Has model.safetensors, or several files and their index.
            Where both exist, the single file is used, as in transformers.

    Returns:
        Dict of tensor names to memory-mapped NumPy arrays.

    Raises:
        ValueError: If a file is missing, truncated or malformed, or does not have the tensors that
            the index lists for it.
    """
    folder = Path(folder)
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return open_safetensors(folder / SINGLE)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(
            f"{index}: `weight_map` must be an object from tensor names to files. "
            f"Received: {names!r}"
        )
    tensors = {}
    for file in sorted(set(map(str, names.values()))):
        if "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: files must be *.safetensors in the index's own folder. "
                f"Received: {file!r}"
            )
        for name, tensor in open_safetensors(folder / file).items():
            if names.get(name) != file:
                raise ValueError(
                    f"{index} lists {name} in {names.get(name)!r}, but it is stored in {file!r}"
                )
            tensors[name] = tensor
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{index} lists {missing[0]} in {names[missing[0]]!r}, which does not have it"
        )
    return tensors


def open_safetensors(path):
    """Open one safetensors file, without reading any tensor.

    Args:
        path: `pathlib.Path` or string.

    Returns:
        Dict of tensor names to memory-mapped NumPy arrays.

    Raises:
        ValueError: If the file is missing, truncated or malformed. The message names the file and,
            where one is at fault, the tensor.
    """
    path = Path(path)
    header, data = _read_header(path)
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            fine = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            if not fine or end - begin != dtype.itemsize * math.prod(shape):
                raise ValueError
            spans.append((begin, end, name))
            if end <= len(data):
                tensors[name] = data[begin:end].view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            code = str(entry.get("dtype")) if isinstance(entry, dict) else ""
            is_quantized = code not in DTYPES and INTEGERS_AND_FLOAT8.fullmatch(code)
            raise ValueError(
                f"{path}: the entry of {name} must have a dtype of {', '.join(DTYPES)}, a shape "
                f"and two data_offsets that agree. Received: {str(entry)[:200]}"
                + (f". This checkpoint is quantized. {QUANTIZED}" if is_quantized else "")
            ) from error
    end = 0
    # The format has no gaps between tensors, so any overlap shows as a wrong beginning.
    for begin, next_end, name in sorted(spans):
        if begin != end:
            raise ValueError(
                f"{path}: {name} must begin at byte {end} of the data. Received: {begin}"
            )
        end = next_end
    if end != len(data):
        raise ValueError(
            f"{path} is truncated or damaged: it must have {end} bytes of data. "
            f"Received: {len(data)}"
        )
    return tensors


def write_tensors(folder, tensors, dtype, shard_size, report=ignore_progress):
    """Write model.safetensors, or several shards and their index.

    Args:
        folder: `pathlib.Path` or string. An existing folder.
        tensors: list of (`Location`, `LazyTensor`) pairs, in the order to write.
        dtype: NumPy dtype to write.
        shard_size: int. Largest size of one file, in bytes of tensors. A larger tensor gets a file
            of its own.
        report: callable. Called with the number of bytes of each block after it is written.
    """
    folder = Path(folder)
    shards, capacity = [[]], shard_size
    for location, tensor in tensors:
        size = dtype.itemsize * math.prod(location.shape)
        if size > capacity and shards[-1]:
            shards.append([])
            capacity = shard_size
        shards[-1].append((location, tensor))
        capacity -= size
    if len(shards) == 1:
        return write_safetensors(folder / SINGLE, shards[0], dtype, report)
    files = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        files |= {location.name: file for location, _ in shard}
        write_safetensors(folder / file, shard, dtype, report)
    total = sum(dtype.itemsize * math.prod(location.shape) for location, _ in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path, tensors, dtype, report=ignore_progress):
    """Write one safetensors file at `path`. The other arguments are those of `write_tensors`."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for location, _ in tensors:
        begin, end = end, end + dtype.itemsize * math.prod(location.shape)
        header[location.name] = {
            "dtype": code,
            "shape": list(location.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The format wants data aligned to 8 bytes.
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for location, tensor in tensors:
            for block in tensor.blocks(location, dtype):
                file.write(as_bytes(block))
                report(block.nbytes)


def _read_header(path):
    """Return the header, without its metadata, and the memory-mapped bytes after it."""
    check_link(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is truncated or no safetensors file: it has {size} bytes and a header "
                f"of {length}{explain_pointer(path)}"
            )
        if length > MAX_HEADER:
            raise ValueError(
                f"{path}: the header must have at most {MAX_HEADER} bytes. Received: {length}"
            )
        header = parse_json(file.read(length), f"The header of {path}")
    header.pop("__metadata__", None)
    offset = 8 + length
    data = np.memmap(path, mode="r", offset=offset) if size > offset else np.empty(0, "uint8")
    return header, data
