"""Rematerialisation: the same gradients, with one layer in memory at a time."""

import keras
import numpy as np
import pytest
from common import gradients, to_numpy
from keras import ops

from keras_vaultgemma import backend

ROWS, WIDTH, INNER = 64, 16, 4096


def stack(layers, recomputed):
    """(total, variables) of blocks that are wide inside and narrow between one another."""
    keras.utils.set_random_seed(0)
    matrices = [
        (
            keras.Variable(keras.random.normal((WIDTH, INNER)) / 8),
            keras.Variable(keras.random.normal((INNER, WIDTH)) / 64),
        )
        for _ in range(layers)
    ]
    x = keras.random.normal((ROWS, WIDTH))

    def block(x, first, second):
        return x + ops.matmul(ops.gelu(ops.matmul(x, first)), second)

    def total():
        y = x
        for first, second in matrices:
            y = recomputed(block)(y, backend.value_of(first), backend.value_of(second))
        return ops.sum(ops.square(y))

    return total, [matrix for pair in matrices for matrix in pair]


def test_gradients_are_those_of_the_function():
    found, expected = (
        gradients(*stack(3, how)) for how in (backend.remat, lambda function: function)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_several_results_and_integers():
    """As for blocks with dropout, which take and return the state of a seed."""

    def function(x, seed):
        return x * ops.cast(seed, "float32"), seed + 1

    variable = keras.Variable([1.0, 2.0])

    def total():
        y, seed = backend.remat(function)(
            backend.value_of(variable), ops.convert_to_tensor(np.array(3, "int32"))
        )
        return ops.sum(y) * ops.cast(seed, "float32")

    np.testing.assert_array_equal(gradients(total, [variable])[0], [12, 12])


@pytest.mark.skipif(
    backend.NAME != "jax", reason="only JAX reports the memory of a compiled function"
)
def test_one_layer_is_in_memory_at_a_time():
    import jax

    def memory(layers):
        total, variables = stack(layers, backend.remat)

        def stateless(values):
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return total()

        compiled = jax.jit(jax.grad(stateless)).lower([v.value for v in variables]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(12) - memory(4) < 4 * ROWS * INNER


@pytest.mark.parametrize("compile", [None, dict(jit_compile=True), dict(jit_compile=False)])
def test_an_elementwise_function_and_its_gradients(compile):
    """TensorFlow compiles it alone in a graph, with the rest under XLA, and not at all eagerly."""

    def gated(gate, up):
        return ops.tanh(gate) * up

    def run(gate, up):
        calls = backend.remat(gated, elementwise=True)

        def total(tensors):
            y = calls(calls(*tensors), tensors[1])  # two calls share one compiled function
            return ops.sum(y * y), y

        return backend.gradients(total, [gate, up])

    gate, up = np.random.default_rng(0).normal(size=(2, 3, 5)).astype("float32")
    function = run if compile is None else backend.compile_function(run, [], **compile)
    (of_gate, of_up), y = function(*map(ops.convert_to_tensor, (gate, up)))
    inner = np.tanh(gate) * up
    expected = np.tanh(inner) * up
    slope = (1 - np.tanh(inner) ** 2) * up
    np.testing.assert_allclose(to_numpy(y), expected, atol=1e-6)
    np.testing.assert_allclose(
        to_numpy(of_gate), 2 * expected * slope * (1 - np.tanh(gate) ** 2) * up, atol=1e-5
    )
    np.testing.assert_allclose(
        to_numpy(of_up), 2 * expected * (np.tanh(inner) + slope * np.tanh(gate)), atol=1e-5
    )
