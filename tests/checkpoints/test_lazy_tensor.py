"""Tensors of a mapped file: read whole, in blocks, and in other dtypes."""

import math

import ml_dtypes
import numpy as np
import pytest

from keras_vaultgemma.checkpoints import lazy_tensor
from keras_vaultgemma.checkpoints.lazy_tensor import (
    DTYPES,
    LazyTensor,
    as_bytes,
    as_dtype,
    dtype_name,
    equal_bits,
    widest,
)
from keras_vaultgemma.checkpoints.weight_map import Location

pytestmark = pytest.mark.any_backend

PLAIN, TRANSPOSED = Location("x", (3, 4), (0, 1)), Location("x", (4, 3), (1, 0))
VALUE = np.arange(12, dtype="float32").reshape(3, 4) + 1 / 3


def stored(tmp_path, value=VALUE, location=PLAIN):
    value.tofile(tmp_path / "x")
    return LazyTensor(
        np.memmap(tmp_path / "x", value.dtype, "r", shape=value.shape), location, (3, 4)
    )


@pytest.mark.parametrize("location", [PLAIN, TRANSPOSED])
@pytest.mark.parametrize("dtype", [None, *DTYPES, np.dtype("float16")])
def test_read_returns_new_memory(tmp_path, location, dtype):
    tensor = stored(tmp_path, np.ascontiguousarray(location.from_variable(VALUE)), location)
    value = tensor.read(dtype)
    assert value.dtype == as_dtype(dtype or "float32")
    assert value.flags.c_contiguous and value.flags.writeable
    (tmp_path / "x").write_bytes(bytes(48))
    assert np.array_equal(value, VALUE.astype(value.dtype))
    assert (tensor.name, tensor.shape, tensor.dtype) == ("x", (3, 4), np.dtype("float32"))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (1, 0, 2), (2, 0, 1)])
def test_strips_of_several_threads_make_up_the_variable(
    tmp_path, monkeypatch, source, target, axes
):
    """There are more rows than a strip has, and no multiple of it."""
    monkeypatch.setattr(lazy_tensor, "STRIP_BYTES", 1)
    shape = (3 * lazy_tensor.ALIGNMENT + 5, 6, 4)[: len(axes)]
    value = np.random.default_rng(0).normal(size=shape).astype(DTYPES[source])
    value.tofile(tmp_path / "x")
    merged = [shape[axis] for axis in axes]
    merged = (*merged[:1], math.prod(merged[1:]))
    mapped = np.memmap(tmp_path / "x", value.dtype, "r", shape=shape)
    tensor = LazyTensor(mapped, Location("x", shape, axes), merged)
    read = tensor.read(target)
    assert np.array_equal(read, np.transpose(value, axes).reshape(merged).astype(DTYPES[target]))
    assert read.dtype == DTYPES[target] and read.flags.c_contiguous
    assert tensor.is_finite is True


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4), (300, 5)])
def test_memory_is_aligned(tmp_path, shape):
    np.ones(shape, "float32").tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", "float32", "r", shape=shape)
    tensor = LazyTensor(mapped, Location("x", shape, tuple(range(len(shape)))), shape)
    assert {tensor.read(dtype).ctypes.data % 64 for dtype in DTYPES for _ in range(5)} == {0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("position", [0, 150, 299])
def test_read_reports_whether_a_value_is_finite(tmp_path, monkeypatch, dtype, bad, position):
    monkeypatch.setattr(lazy_tensor, "STRIP_BYTES", 1)
    limit = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    value = np.resize(np.array([limit, -limit, 0.0, -0.0], "float32"), (300, 1)).astype(
        DTYPES[dtype]
    )
    location = Location("x", (1, 300), (1, 0))

    def read(value):
        value.T.tofile(tmp_path / "x")
        tensor = LazyTensor(
            np.memmap(tmp_path / "x", value.dtype, "r", shape=(1, 300)), location, (300, 1)
        )
        plain = LazyTensor(
            np.memmap(tmp_path / "x", value.dtype, "r", shape=(300, 1)),
            PLAIN._replace(shape=(300, 1)),
            (300, 1),
        )
        assert tensor.is_finite is None
        tensor.read()
        plain.read()
        assert tensor.is_finite is plain.is_finite
        return tensor.is_finite

    assert read(value) is True
    value[position] = bad
    assert read(value) is False


def test_is_finite_describes_the_value_after_the_cast(tmp_path):
    tensor = stored(tmp_path, VALUE * 1e6)
    assert [
        (tensor.read(dtype).dtype.name, tensor.is_finite) for dtype in ("float16", "float32")
    ] == [
        ("float16", False),
        ("float32", True),
    ]


def test_nothing_is_read_before_read(tmp_path):
    tensor = stored(tmp_path)
    (tmp_path / "x").write_bytes(np.ones(12, "float32").tobytes())
    assert tensor.read().tolist() == [[1.0] * 4] * 3


def test_read_overflows_to_infinity(tmp_path):
    assert np.isinf(stored(tmp_path, VALUE * 1e6).read("float16"))[1:].all()


@pytest.mark.parametrize("size", [1, 32, 2**20])
@pytest.mark.parametrize("location", [PLAIN, TRANSPOSED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_concatenate_to_the_other_files_tensor(tmp_path, monkeypatch, size, location, dtype):
    monkeypatch.setattr(lazy_tensor, "BLOCK_BYTES", size)
    blocks = list(stored(tmp_path).blocks(location, DTYPES[dtype]))
    assert np.array_equal(
        np.concatenate(blocks), location.from_variable(VALUE).astype(DTYPES[dtype])
    )
    assert all(block.flags.c_contiguous for block in blocks)
    assert (len(blocks) > 1) is (size < 2**20)


def test_blocks_have_the_same_rows_in_every_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_tensor, "BLOCK_BYTES", 32)
    for dtype in DTYPES.values():
        tensor = stored(tmp_path, VALUE.astype(dtype))
        assert [len(block) for block in tensor.blocks(PLAIN, DTYPES["float32"])] == [2, 1]


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_a_value_out_of_the_dtypes_range_raises(tmp_path, source):
    value = VALUE.copy()
    value[1, 1] = -70_000
    tensor = stored(tmp_path, value.astype(DTYPES[source]))
    with pytest.raises(
        ValueError, match=r"x must be from -65504 to 65504 for float16. Received: ±(70000|70144)"
    ):
        list(tensor.blocks(PLAIN, DTYPES["float16"]))
    (block,) = tensor.blocks(PLAIN, DTYPES["bfloat16"])
    assert np.isfinite(block).all()


def test_infinity_and_nan_are_preserved(tmp_path):
    value = VALUE.copy()
    value[0] = [np.inf, -np.inf, np.nan, 0]
    (block,) = stored(tmp_path, value).blocks(PLAIN, DTYPES["float16"])
    assert np.array_equal(block[0], value[0], equal_nan=True)


def test_widest():
    f32, f16, bf16 = DTYPES["float32"], DTYPES["float16"], DTYPES["bfloat16"]
    assert [widest([f16]), widest([bf16, bf16]), widest([bf16, f32]), widest([f16, bf16])] == [
        f16,
        bf16,
        f32,
        f32,
    ]
    assert [dtype_name(dtype) for dtype in DTYPES.values()] == list(DTYPES)


def test_equal_bits(monkeypatch):
    monkeypatch.setattr(lazy_tensor, "BLOCK_BYTES", 32)
    a = VALUE.astype(ml_dtypes.bfloat16)
    a[2, 3] = np.nan
    assert equal_bits(a, a.copy())
    assert not equal_bits(a, a.astype("float32"))
    assert not equal_bits(a, a.view("float16"))
    assert not equal_bits(a, a[:2])
    b = a.copy()
    b[2, 2] = -b[2, 2]
    assert not equal_bits(a, b)
    assert not equal_bits(np.zeros(2, "float32"), -np.zeros(2, "float32"))
    assert equal_bits(np.zeros((0, 3), "float32"), np.zeros((0, 3), "float32"))


def test_as_bytes():
    assert (
        bytes(as_bytes(VALUE.astype(ml_dtypes.bfloat16)))
        == VALUE.astype(ml_dtypes.bfloat16).tobytes()
    )
