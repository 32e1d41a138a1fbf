import keras
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend
from keras_vaultgemma.backend.compile import EAGER_CALLS


def test_compiled_function_reads_variables_anew():
    variable = keras.Variable(np.ones(2, "float32"))
    double = backend.compile_function(lambda x: x * variable, [variable])
    x = keras.ops.convert_to_tensor(np.array([1.0, 2.0], "float32"))
    np.testing.assert_array_equal(to_numpy(double(x)), [1, 2])
    variable.assign([3.0, 4.0])
    np.testing.assert_array_equal(to_numpy(double(x)), [3, 8])


def test_a_step_is_the_same_when_it_is_played_back(monkeypatch):
    """A state that goes round, a buffer that is written in place, and variables that change from loop to loop."""
    monkeypatch.setattr("keras_vaultgemma.backend.compile.EAGER_CALLS", 2)
    variable = keras.Variable(np.array([2.0, 3.0], "float32"))

    def step(state, numbers):
        buffer, slot = state["buffer"], state["slot"]
        value = keras.ops.take(numbers, slot, axis=0) * variable
        return {"buffer": backend.write_slice(buffer, value[None, None], slot), "slot": slot + 1}

    begin = backend.compile_step(step, [variable])
    numbers = np.arange(1, 7, dtype="float32")
    expected = np.zeros((1, 6, 2), "float32")
    state = {"buffer": keras.ops.zeros((1, 6, 2)), "slot": keras.ops.convert_to_tensor(np.int32(0))}
    for i in range(6):
        variable.assign([2.0, i])
        state = begin()(state, keras.ops.convert_to_tensor(numbers))
        expected[0, i] = numbers[i] * np.array([2, i])
        np.testing.assert_array_equal(to_numpy(state["buffer"]), expected)
        assert int(state["slot"]) == i + 1


@pytest.mark.skipif(backend.NAME != "torch", reason="other backends compile whole loops")
def test_a_step_is_recorded_once_for_its_shapes():
    calls = []
    step = backend.compile_step(lambda x: calls.append(1) or x + 1, [])()
    for length in (2, 3):
        for _ in range(2 * EAGER_CALLS):
            step(keras.ops.zeros((length,)))
    assert len(calls) == 2 * (EAGER_CALLS + 1)


@pytest.mark.skipif(backend.NAME != "torch", reason="other backends compile whole loops")
def test_recording_a_step_copies_no_argument():
    """A cache would be in memory twice."""
    step = backend.compile_step(lambda x: x.add_(1), [])()
    x = start = keras.ops.zeros((3,))
    for i in range(2 * EAGER_CALLS):
        x = step(x)
        assert x.data_ptr() == start.data_ptr()
        assert to_numpy(x).tolist() == [i + 1] * 3


@pytest.mark.skipif(backend.NAME != "torch", reason="other backends have no such generator")
def test_global_generator_is_what_a_layer_without_a_seed_draws_from():
    layer, x, found = keras.layers.Dropout(0.5), np.ones((1, 64), "float32"), []
    for seed in (3, 2**64 - 1, keras.ops.convert_to_tensor(np.int32(3))):
        backend.seed_global_generator(seed)
        found.append(to_numpy(layer(x, training=True)).tolist())
    assert found[0] == found[2] != found[1]


def test_variables_can_be_read_in_the_middle_of_an_epoch():
    class Read(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            backend.update_variables(self.model)
            values.append(float(to_numpy(self.model.weights[0])[0, 0]))

    model, values = (
        keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")]),
        [],
    )
    model.compile(keras.optimizers.SGD(0.125), "mse")
    model.fit(np.ones((3, 1)), np.zeros((3, 1)), batch_size=1, callbacks=[Read()], verbose=0)
    assert values == [0.75, 0.625, 0.5625]  # of (w + b)² both gradients are 2 (w + b): 2, 1 and 1/2


@pytest.mark.skipif(keras.config.backend() != "jax", reason="JAX's cache")
def test_compilations_are_kept_where_nobody_else_said_so(tmp_path):
    import jax

    try:
        for folder in ("compiled", "other"):
            backend.cache_compilations(tmp_path / folder)
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.parametrize("widths, kinds", [((3, 3, 3), 1), ((3, 3, 4), 2)])
def test_a_program_for_each_kind_of_layer(widths, kinds):
    calls, shared = [], keras.Variable(2.0)

    def double(layer, x):
        calls.append(layer)
        return layer(x) * shared

    layers = [keras.layers.Dense(3) for _ in widths]
    xs = [np.full((1, width), i + 1.0, "float32") for i, width in enumerate(widths)]
    expected = [to_numpy(layer(x)) for layer, x in zip(layers, xs, strict=True)]
    variables = [shared, *(v for layer in layers for v in layer.variables)]
    functions = backend.compile_function(double, variables, layers=layers)
    for factor in (2, 3):
        shared.assign(factor)
        for function, x, one in zip(functions, xs, expected, strict=True):
            np.testing.assert_allclose(
                to_numpy(function(keras.ops.convert_to_tensor(x))), factor * one, rtol=1e-5
            )
    assert (
        len(calls)
        == {"jax": kinds, "tensorflow": len(layers), "torch": 2 * len(layers)}[backend.NAME]
    )


@pytest.mark.parametrize("widths, traces", [((3, 3, 3), 1), ((3, 3, 4), 3)])
def test_layers_of_a_kind_are_traced_once(widths, traces):
    calls = []

    class Counted(keras.layers.Dense):
        def call(self, x):
            calls.append(self.name)
            return super().call(x)

    layers = [Counted(3, use_bias=False, name="dense") for _ in widths]
    xs = [np.full((1, width), i + 1.0, "float32") for i, width in enumerate(widths)]
    expected = [to_numpy(layer(x)) for layer, x in zip(layers, xs, strict=True)]
    variables = [layer.kernel for layer in layers]

    def apply(*xs):
        return [function(x) for function, x in zip(backend.trace_once(layers), xs, strict=True)]

    calls.clear()
    found = backend.compile_function(apply, variables)(*map(keras.ops.convert_to_tensor, xs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), other, rtol=1e-5)
    assert len(calls) == (len(widths) if backend.NAME == "torch" else traces)
