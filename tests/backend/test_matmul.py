import importlib

import keras
import numpy as np
import pytest
from common import gradients, to_numpy

from keras_vaultgemma import backend
from keras_vaultgemma.layers.reversible_embedding import ReversibleEmbedding


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 24), (2, 3, 24), (24,), (1, 1, 64), (5, 7, 24), (2, 40, 24)]
)
@pytest.mark.parametrize("width", [40, 41])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("is_intel", [False, True])
def test_matmul_with_and_without_gradients(
    monkeypatch, dtype, tolerance, shape, width, transposed, is_intel
):
    """For one, few and many rows."""
    matmul = importlib.import_module("keras_vaultgemma.backend.matmul")
    monkeypatch.setattr(matmul, "_is_intel", lambda: is_intel)
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.normal(size=shape),
        rng.normal(size=(width, shape[-1]) if transposed else (shape[-1], width)),
    )
    x, kernel = (
        keras.ops.cast(keras.ops.convert_to_tensor(a.astype("float32")), dtype) for a in (x, kernel)
    )
    exact = [to_numpy(keras.ops.cast(a, "float32")).astype("float64") for a in (x, kernel)]
    expected = exact[0] @ (exact[1].T if transposed else exact[1])
    compiled = backend.compile_function(lambda a, b: backend.matmul(a, b, transposed), [])
    for function in (compiled, lambda a, b: backend.matmul(a, b, transposed)):
        found = function(x, kernel)
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        found = to_numpy(keras.ops.cast(found, "float32"))
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_float32_table_under_a_mixed_policy(rows):
    """Keras does not cast the variable of an embedding."""
    layer = ReversibleEmbedding(8, 6, dtype="mixed_bfloat16")
    layer.build()
    x = keras.ops.cast(np.random.default_rng(0).normal(size=(1, rows, 6)), "bfloat16")
    expected = to_numpy(keras.ops.cast(x, "float32")) @ to_numpy(layer.table).T
    found = to_numpy(keras.ops.cast(layer(x, reverse=True), "float32"))
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("sizes", [(24, 3), (3, 24), (4, 4)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (5,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_a_thin_matrix(sizes, shape, transposed):
    """A matrix `[in, out]` that is narrower on either side, or on none."""
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        rng.normal(size=size).astype("float32")
        for size in ((*shape, sizes[0]), sizes, (*shape, sizes[1]))
    )
    variables = [keras.Variable(a) for a in (x, kernel.T if transposed else kernel)]

    def loss():
        product = backend.thin_matmul(*map(backend.value_of, variables), transposed)
        return keras.ops.sum(keras.ops.multiply(product, weights))

    x_gradient, kernel_gradient = gradients(loss, variables)
    np.testing.assert_allclose(x_gradient, weights @ kernel.T, rtol=1e-4, atol=1e-4)
    expected = x.reshape(-1, sizes[0]).T @ weights.reshape(-1, sizes[1])
    expected = expected.T if transposed else expected
    np.testing.assert_allclose(kernel_gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_matrix_for_each_row():
    rng = np.random.default_rng(0)
    x, kernels = (
        rng.normal(size=(2, 3, 600)).astype("float32"),
        rng.normal(size=(2, 600, 8)).astype("float32"),
    )
    found = to_numpy(backend.matmul(*map(keras.ops.convert_to_tensor, (x, kernels))))
    np.testing.assert_allclose(found, x.astype("float64") @ kernels, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 3, 24), (1, 1, 64)])
@pytest.mark.parametrize("transposed", [False, True])
def test_int8_matmul_is_exact(shape, transposed):
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.integers(-127, 128, s).astype("int8")
        for s in (shape, (40, shape[-1]) if transposed else (shape[-1], 40))
    )
    expected = x.astype("int64") @ (kernel.T if transposed else kernel).astype("int64")
    compiled = backend.compile_function(lambda a, b: backend.int8_matmul(a, b, transposed), [])
    found = to_numpy(compiled(*map(keras.ops.convert_to_tensor, (x, kernel))))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(16, 40), (1152, 64)])
def test_one_row_of_int8_is_exact_at_the_largest_products(shape):
    """JAX sums in float32, which is exact up to 2^24."""
    size, width = shape
    for kernel, transposed in (
        (np.full(shape, -127, "int8"), False),
        (np.full((width, size), -127, "int8"), True),
    ):
        compiled = backend.compile_function(
            lambda a, b, t=transposed: backend.int8_matmul(a, b, t), []
        )
        found = to_numpy(
            compiled(
                *map(keras.ops.convert_to_tensor, (np.full((1, 1, size), -127, "int8"), kernel))
            )
        )
        assert found.shape == (1, 1, width) and (found == size * 127**2).all()


@pytest.mark.skipif(
    backend.NAME != "jax", reason="only JAX reports the memory of a compiled function"
)
@pytest.mark.parametrize(
    "function, dtype, rows, transposed",
    [
        ("matmul", "bfloat16", 1, False),
        ("matmul", "bfloat16", 1, True),
        ("matmul", "bfloat16", 4, False),
        ("matmul", "bfloat16", 4, True),
        ("int8_matmul", "int8", 1, False),
        ("int8_matmul", "int8", 1, True),
        ("int8_matmul", "int8", 4, False),
        ("int8_matmul", "int8", 4, True),
        ("take_rows", "bfloat16", 1, False),
        ("take_rows", "bfloat16", 4, False),
    ],
)
def test_a_loop_keeps_no_float32_copy_of_a_matrix(function, dtype, rows, transposed):
    """Decoding would otherwise hold and read four times the memory of int8 weights."""
    import jax

    def step(x, kernel):
        if function == "take_rows":
            return backend.take_rows(kernel, keras.ops.cast(x[:, 0], "int32")) * 0.5
        product = getattr(backend, function)(x, kernel, transposed)
        return keras.ops.cast(keras.ops.tanh(keras.ops.cast(product, "float32")) * 9, dtype)

    def loop(x, kernel):
        return keras.ops.fori_loop(0, 5, lambda _, x: step(x, kernel), x)

    x, kernel = jax.ShapeDtypeStruct((rows, 1152), dtype), jax.ShapeDtypeStruct((1152, 1152), dtype)
    compiled = jax.jit(loop).lower(x, kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 1152 * 1152 * 4


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_gradients_of_a_transposed_matmul(rows):
    rng = np.random.default_rng(0)
    table = keras.Variable(rng.normal(size=(40, 24)).astype("float32"))
    x = keras.ops.convert_to_tensor(rng.normal(size=(1, rows, 24)).astype("float32"))
    (found,) = gradients(
        lambda: keras.ops.sum(backend.matmul(x, keras.ops.convert_to_tensor(table), True)), [table]
    )
    np.testing.assert_allclose(
        found, np.broadcast_to(to_numpy(x).sum((0, 1)), (40, 24)), rtol=1e-5, atol=1e-5
    )
