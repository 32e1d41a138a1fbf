import keras
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend


def test_compiled_function_reads_current_values_of_variables():
    variable = keras.Variable(np.ones(2, "float32"))
    double = backend.compile_function(lambda x: x * variable, [variable])
    x = keras.ops.convert_to_tensor(np.array([1.0, 2.0], "float32"))
    np.testing.assert_array_equal(to_numpy(double(x)), [1, 2])
    variable.assign([3.0, 4.0])
    np.testing.assert_array_equal(to_numpy(double(x)), [3, 8])


@pytest.mark.skipif(backend.NAME != "torch", reason="other backends have no such generator")
def test_layers_without_a_seed_draw_from_the_global_generator():
    layer, x, found = keras.layers.Dropout(0.5), np.ones((1, 64), "float32"), []
    for seed in (3, 2**64 - 1, keras.ops.convert_to_tensor(np.int32(3))):
        backend.seed_global_generator(seed)
        found.append(to_numpy(layer(x, training=True)).tolist())
    assert found[0] == found[2] != found[1]


def test_variables_are_updated_in_the_middle_of_an_epoch():
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
def test_the_first_compilation_cache_is_used(tmp_path):
    import jax

    configured = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        for folder in ("compiled", "other"):
            backend.cache_compilations(tmp_path / folder)
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", configured)


@pytest.mark.parametrize("widths, traces", [((3, 3, 3), 1), ((3, 3, 4), 3)])
def test_equal_layers_are_traced_once(widths, traces):
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
        functions = backend.trace_once(lambda layer, x: layer(x), layers)
        return [function(x) for function, x in zip(functions, xs, strict=True)]

    calls.clear()
    found = backend.compile_function(apply, variables)(*map(keras.ops.convert_to_tensor, xs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), other, rtol=1e-5)
    assert len(calls) == (len(widths) if backend.NAME == "torch" else traces)


def test_is_tracing_inside_a_compiled_function_alone():
    found = []
    compiled = backend.compile_function(lambda x: found.append(backend.is_tracing()) or x, [])
    compiled(keras.ops.convert_to_tensor(np.ones(2, "float32")))
    assert found[0] == (backend.NAME != "torch") and not backend.is_tracing()


@pytest.mark.skipif(backend.NAME != "jax", reason="other backends have no such setting")
def test_in_32_bits():
    import jax

    with jax.enable_x64(True):
        assert jax.numpy.arange(2).dtype == "int64"
        with backend.in_32_bits():
            assert jax.numpy.arange(2).dtype == "int32"
