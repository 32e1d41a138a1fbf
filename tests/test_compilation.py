import keras
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend


def test_compiled_function_reads_variables_anew():
    variable = keras.Variable(np.ones(2, "float32"))
    double = backend.compile_function(lambda x: x * variable, [variable])
    x = keras.ops.convert_to_tensor(np.array([1.0, 2.0], "float32"))
    np.testing.assert_array_equal(to_numpy(double(x)), [1, 2])
    variable.assign([3.0, 4.0])
    np.testing.assert_array_equal(to_numpy(double(x)), [3, 8])


@pytest.mark.skipif(backend.NAME != "torch", reason="other backends have no such generator")
def test_global_generator_is_what_a_layer_without_a_seed_draws_from():
    layer, x, found = keras.layers.Dropout(0.5), np.ones((1, 64), "float32"), []
    for seed in (3, 2**64 - 1, 3):
        backend.seed_global_generator(seed)
        found.append(to_numpy(layer(x, training=True)).tolist())
    assert found[0] == found[2] != found[1]


def test_variables_can_be_read_in_the_middle_of_an_epoch():
    class Read(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            backend.update_variables(self.model)
            values.append(float(to_numpy(self.model.weights[0])[0, 0]))

    model, values = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")]), []
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
