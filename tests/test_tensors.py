import keras
import ml_dtypes
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend


def test_write_slice_leaves_rows_that_share_memory_apart():
    row = keras.ops.broadcast_to(keras.ops.zeros((1, 3, 1)), (2, 3, 1))
    written = backend.write_slice(row, keras.ops.convert_to_tensor(np.array([[[1.0]], [[2.0]]], "float32")), 1)
    np.testing.assert_array_equal(to_numpy(written)[:, :, 0], [[0, 1, 0], [0, 2, 0]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_variables_start_from_numpy_bit_by_bit(dtype):
    array = np.array([1.5, -0.0, np.inf, 3.0e-5], "float32").astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    variable = keras.Variable(lambda shape, dtype: backend.from_numpy(array), shape=(4,), dtype=dtype)
    assert variable.dtype == dtype
    np.testing.assert_array_equal(to_numpy(keras.ops.cast(variable.value, "float32")), array.astype("float32"))
