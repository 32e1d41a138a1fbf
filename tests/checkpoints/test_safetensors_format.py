"""Safetensors files: those of the safetensors library, and malformed ones."""

import json
import os
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from keras_vaultgemma.checkpoints.lazy_tensor import LazyTensor
from keras_vaultgemma.checkpoints.safetensors_format import (
    INDEX,
    MAX_HEADER,
    SINGLE,
    open_safetensors,
    open_tensors,
    write_tensors,
)
from keras_vaultgemma.checkpoints.weight_map import Location

pytestmark = pytest.mark.any_backend

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path, header, data=b"", length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(
        (len(content) if length is None else length).to_bytes(8, "little") + content + data
    )
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_what_the_library_writes(tmp_path, dtype):
    values = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    path = tmp_path / SINGLE
    safetensors.torch.save_file(
        {k: v.to(getattr(torch, dtype)) for k, v in values.items()}, path, {"format": "pt"}
    )
    tensors = open_tensors(tmp_path)
    assert tensors.keys() == values.keys()
    for name, value in values.items():
        assert tensors[name].dtype == np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        assert tensors[name].shape == tuple(value.shape)
        expected = value.to(getattr(torch, dtype)).float().numpy()
        assert np.array_equal(tensors[name].astype("float32"), expected)
    assert isinstance(tensors["a"], np.memmap)
    assert not tensors["a"].flags.writeable


def test_a_file_may_hold_no_tensor(tmp_path):
    assert open_safetensors(write(tmp_path / SINGLE, {"__metadata__": {"format": "pt"}})) == {}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        7,
        {},
        {**ENTRY, "dtype": "I8"},
        {**ENTRY, "dtype": ["F32"]},
        {**ENTRY, "shape": None},
        {**ENTRY, "shape": [2, "3"]},
        {**ENTRY, "shape": [2, 3.0]},
        {**ENTRY, "shape": [-2, -3]},
        {**ENTRY, "shape": [2, 4]},
        {**ENTRY, "shape": [True, 6]},
        {**ENTRY, "shape": [1] * 70 + [6]},
        {**ENTRY, "shape": [0, 2**70], "data_offsets": [0, 0]},
        {**ENTRY, "data_offsets": [0]},
        {**ENTRY, "data_offsets": [0, 24, 24]},
        {**ENTRY, "data_offsets": [0.0, 24.0]},
        {**ENTRY, "data_offsets": [-24, 0]},
        {**ENTRY, "data_offsets": [24, 0]},
        {**ENTRY, "data_offsets": [0, 23]},
        {**ENTRY, "data_offsets": {"0": 24, "1": 2}},
    ],
)
def test_a_malformed_entry_raises(tmp_path, entry):
    path = write(tmp_path / SINGLE, {"x": entry}, bytes(24))
    with pytest.raises(
        ValueError,
        match=rf"{SINGLE}: the entry of x must have a dtype of F32, F16, BF16.*Received: ",
    ):
        open_safetensors(path)


def test_tensors_must_fill_the_file(tmp_path):
    path = tmp_path / SINGLE
    later = {**ENTRY, "data_offsets": [24, 48]}
    assert open_safetensors(write(path, {"y": later, "x": ENTRY}, bytes(48))).keys() == {"x", "y"}
    with pytest.raises(
        ValueError, match=f"{SINGLE}: y must begin at byte 24 of the data. Received: 0"
    ):
        open_safetensors(write(path, {"x": ENTRY, "y": ENTRY}, bytes(24)))
    with pytest.raises(
        ValueError, match=f"{SINGLE}: y must begin at byte 0 of the data. Received: 24"
    ):
        open_safetensors(write(path, {"y": later}, bytes(48)))
    for size in (0, 1, 47, 49):
        with pytest.raises(
            ValueError,
            match=rf"{SINGLE} is truncated or damaged: it must have 48 bytes of data.*Received: {size}",
        ):
            open_safetensors(write(path, {"x": ENTRY, "y": later}, bytes(size)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object. Received: list"),
    ],
)
def test_a_malformed_header_raises(tmp_path, header, message):
    with pytest.raises(ValueError, match=rf"{SINGLE}.*{message}"):
        open_safetensors(write(tmp_path / SINGLE, header, bytes(24)))


@pytest.mark.parametrize("length", [3, 2**20, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_raises(tmp_path, length):
    with pytest.raises(
        ValueError,
        match=rf"{SINGLE} is truncated or no safetensors file: it has 10 bytes and a header of {length}",
    ):
        open_safetensors(write(tmp_path / SINGLE, b"{}", length=length))


def test_a_file_too_short_for_a_header_raises(tmp_path):
    (tmp_path / SINGLE).write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match=f"{SINGLE} is truncated"):
        open_safetensors(tmp_path / SINGLE)


def test_a_giant_header_raises_before_it_is_read(tmp_path):
    path = write(tmp_path / SINGLE, b"{}", length=MAX_HEADER + 1)
    os.truncate(path, 2 * MAX_HEADER)  # holes: it takes no space
    start = time.process_time()
    with pytest.raises(
        ValueError, match=f"{SINGLE}: the header must have at most {MAX_HEADER} bytes"
    ):
        open_safetensors(path)
    assert time.process_time() - start < 1


def test_a_giant_tensor_in_a_small_file_raises(tmp_path):
    size = 10 * 2**30
    path = write(
        tmp_path / SINGLE,
        {"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}},
        bytes(800),
    )
    with pytest.raises(
        ValueError, match=f"{SINGLE} is truncated or damaged: it must have {size} bytes of data"
    ):
        open_safetensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{SINGLE} does not exist"):
        open_tensors(tmp_path)


def shards(folder, index):
    for name in ("a", "b"):
        write(
            folder / f"{name}.safetensors",
            {name: ENTRY},
            np.full(6, ord(name), "float32").tobytes(),
        )
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def test_an_index_joins_its_files(tmp_path):
    tensors = open_tensors(shards(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a": [[97.0] * 3] * 2,
        "b": [[98.0] * 3] * 2,
    }


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "`weight_map` must be an object from tensor names to files. Received: None"),
        ({}, "`weight_map` must be an object"),
        (["a.safetensors"], "`weight_map` must be an object"),
        ({"a": "/etc/a.safetensors"}, r"the index's own folder. Received: '/etc/a.safetensors'"),
        ({"a": "../a.safetensors"}, r"the index's own folder. Received: '../a.safetensors'"),
        ({"a": "sub/a.safetensors"}, "the index's own folder"),
        ({"a": "..\\a.safetensors"}, "the index's own folder"),
        ({"a": ".."}, "the index's own folder"),
        ({"a": "a.bin"}, r"files must be \*.safetensors"),
        ({"a": 7}, "the index's own folder. Received: '7'"),
        ({"a": ["a.safetensors"]}, "the index's own folder"),
        ({"a": "c.safetensors"}, "c.safetensors does not exist"),
        ({"b": "a.safetensors"}, "lists a in None, but it is stored in 'a.safetensors'"),
        (
            {"a": "b.safetensors", "b": "b.safetensors"},
            "lists a in 'b.safetensors', which does not have it",
        ),
        (
            {"a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors"},
            "lists c in 'b.safetensors', which does not have it",
        ),
    ],
)
def test_a_wrong_index_raises(tmp_path, index, message):
    with pytest.raises(ValueError, match=message):
        open_tensors(shards(tmp_path, index))


def test_a_tensor_in_two_files_raises(tmp_path):
    folder = shards(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    write(
        folder / "b.safetensors", {"b": ENTRY, "a": {**ENTRY, "data_offsets": [24, 48]}}, bytes(48)
    )
    with pytest.raises(
        ValueError, match="lists a in 'a.safetensors', but it is stored in 'b.safetensors'"
    ):
        open_tensors(folder)


# Writing.

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def tensors():
    """Three tensors of 12, 20 and 4 values, to write; the second is transposed in the source."""
    random = np.random.default_rng(0)
    values = {
        "a": random.normal(size=(3, 4)),
        "b": random.normal(size=(5, 4)),
        "c": random.normal(size=4),
    }
    values = {name: value.astype("float32") for name, value in values.items()}
    locations = {
        "a": Location("a", (3, 4), (0, 1)),
        "b": Location("b", (4, 5), (1, 0)),
        "c": Location("c", (4,), (0,)),
    }
    plain = {
        name: Location("", value.shape, tuple(range(value.ndim))) for name, value in values.items()
    }
    return values, [(locations[n], LazyTensor(v, plain[n], v.shape)) for n, v in values.items()]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_reads_what_is_written(tmp_path, tensors, dtype):
    values, to_write = tensors
    reported = []
    dtype = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    write_tensors(tmp_path, to_write, dtype, 10**9, reported.append)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    read = safetensors.torch.load_file(tmp_path / SINGLE)
    assert read.keys() == values.keys()
    for name, value in values.items():
        expected = (value.T if name == "b" else value).astype(dtype).astype("float32")
        assert np.array_equal(read[name].float().numpy(), expected)
    assert reported == [value.size * dtype.itemsize for value in values.values()]
    with safetensors.safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert open_tensors(tmp_path)["b"].offset % 8 == 0


def test_shards_are_filled_in_order(tmp_path, tensors):
    values, to_write = tensors
    write_tensors(tmp_path, to_write, np.dtype("<f4"), 96)  # 48, 80 and 16 bytes
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {
        "metadata": {"total_size": 144},
        "weight_map": {"a": first, "b": second, "c": second},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [first, second, INDEX]
    read = open_tensors(tmp_path)
    assert np.array_equal(read["a"], values["a"]) and np.array_equal(read["b"], values["b"].T)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path, tensors):
    write_tensors(tmp_path, tensors[1], np.dtype("<f4"), 1)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    assert open_tensors(tmp_path).keys() == {"a", "b", "c"}
