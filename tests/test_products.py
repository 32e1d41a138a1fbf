import keras
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 3, 24), (24,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_with_and_without_gradients(dtype, tolerance, shape, transposed):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=shape), rng.normal(size=(40, 24) if transposed else (24, 40))
    x, kernel = (keras.ops.cast(keras.ops.convert_to_tensor(a.astype("float32")), dtype) for a in (x, kernel))
    exact = [to_numpy(keras.ops.cast(a, "float32")).astype("float64") for a in (x, kernel)]
    expected = exact[0] @ (exact[1].T if transposed else exact[1])
    compiled = backend.compile_function(lambda a, b: backend.matmul(a, b, transposed), [])
    for function in (compiled, lambda a, b: backend.matmul(a, b, transposed)):
        found = function(x, kernel)
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        found = to_numpy(keras.ops.cast(found, "float32"))
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 3, 24)])
@pytest.mark.parametrize("transposed", [False, True])
def test_int8_matmul_is_exact(shape, transposed):
    rng = np.random.default_rng(0)
    x, kernel = (rng.integers(-127, 128, s).astype("int8") for s in (shape, (40, 24) if transposed else (24, 40)))
    expected = x.astype("int64") @ (kernel.T if transposed else kernel).astype("int64")
    compiled = backend.compile_function(lambda a, b: backend.int8_matmul(a, b, transposed), [])
    found = to_numpy(compiled(*map(keras.ops.convert_to_tensor, (x, kernel))))
    np.testing.assert_array_equal(found, expected)
