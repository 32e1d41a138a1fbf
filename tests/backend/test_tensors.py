import keras
import ml_dtypes
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend


def test_write_slice_leaves_rows_that_share_memory_apart():
    row = keras.ops.broadcast_to(keras.ops.zeros((1, 3, 1)), (2, 3, 1))
    written = backend.write_slice(
        row, keras.ops.convert_to_tensor(np.array([[[1.0]], [[2.0]]], "float32")), 1
    )
    np.testing.assert_array_equal(to_numpy(written)[:, :, 0], [[0, 1, 0], [0, 2, 0]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_variables_start_from_numpy_bit_by_bit(dtype):
    array = np.array([1.5, -0.0, np.inf, 3.0e-5], "float32").astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    variable = keras.Variable(
        lambda shape, dtype: backend.from_numpy(array), shape=(4,), dtype=dtype
    )
    assert variable.dtype == dtype
    np.testing.assert_array_equal(
        to_numpy(keras.ops.cast(variable.value, "float32")), array.astype("float32")
    )


def aligned(value, dtype):
    """`value` in memory that begins at a multiple of 64 bytes."""
    memory = np.empty(value.size * np.dtype(dtype).itemsize + 64, "u1")
    start = -memory.ctypes.data % 64
    array = memory[start : start + memory.size - 64].view(dtype).reshape(value.shape)
    array[...] = value
    return array


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_memory_is_taken_over_but_by_jax(dtype):
    """On JAX, which would copy foreign memory for training, the variable has its own."""
    value = np.arange(12).reshape(3, 4)
    array = aligned(value, dtype)
    variable = keras.Variable(
        lambda shape, dtype: backend.from_numpy(array), shape=(3, 4), dtype=array.dtype.name
    )
    np.testing.assert_array_equal(to_numpy(keras.ops.cast(variable.value, "float32")), value)
    array[0, 0] = 7
    assert float(to_numpy(keras.ops.cast(variable.value, "float32"))[0, 0]) == (
        0 if backend.NAME == "jax" else 7
    )
    variable.assign(variable.value * 2 + 1)
    expected = value * 2 + 1
    expected[0, 0] = 1 if backend.NAME == "jax" else 15
    np.testing.assert_array_equal(to_numpy(keras.ops.cast(variable.value, "float32")), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_memory_that_is_not_aligned_will_do(dtype):
    memory = np.zeros(1024, "u1")
    start = -memory.ctypes.data % 64 + np.dtype(dtype).itemsize
    array = memory[start : start + 12 * np.dtype(dtype).itemsize].view(dtype).reshape(3, 4)
    array[...] = np.arange(12).reshape(3, 4)
    variable = keras.Variable(
        lambda shape, dtype: backend.from_numpy(array), shape=(3, 4), dtype=array.dtype.name
    )
    np.testing.assert_array_equal(
        to_numpy(keras.ops.cast(variable.value, "float32")), np.arange(12).reshape(3, 4)
    )


@pytest.mark.parametrize("other", [1.0, np.nan, np.inf, -np.inf])
def test_after_changes_nothing(other):
    x, other = np.array([1, -(2**31), 2**31 - 1], "int32"), np.full((2, 3), other, "float32")
    compiled = backend.compile_function(backend.schedule_after, [])
    np.testing.assert_array_equal(
        to_numpy(compiled(*map(keras.ops.convert_to_tensor, (x, other)))), x
    )


def test_argmax_is_the_first_of_equal_numbers():
    x = np.random.default_rng(0).integers(0, 3, (50, 7)).astype("float32")
    for index in range(7):
        found = backend.is_argmax(
            keras.ops.convert_to_tensor(x), keras.ops.full((50,), index, "int32")
        )
        np.testing.assert_array_equal(to_numpy(found), x.argmax(1) == index)
