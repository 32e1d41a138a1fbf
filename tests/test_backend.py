import os
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@pytest.mark.skipif(backend.NAME == "tensorflow", reason="there TensorFlow is the point")
def test_tensorflow_is_never_imported():
    """Not by the import, nor by loading, generating, fitting and saving."""
    result = run(
        "import sys, tempfile\n"
        "import keras_vaultgemma\n"
        "assert 'tensorflow' not in sys.modules, 'import'\n"
        "model = keras_vaultgemma.VaultGemmaCausalLM.from_preset('vaultgemma_tiny')\n"
        "model.generate('Once', max_new_tokens=2)\n"
        "model.fit(['Once upon a time'] * 2, batch_size=2, verbose=0)\n"
        "model.save_to_preset(tempfile.mkdtemp() + '/preset')\n"
        "loaded = [name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'tensorflow_text')]\n"
        "assert not loaded, loaded[:3]\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('tensorflow'), 'hidden for good, or the test says nothing'\n"
    )
    assert result.returncode == 0, result.stderr


def test_unknown_backend_is_named():
    result = run("from keras_vaultgemma import VaultGemmaCausalLM", KERAS_BACKEND="theano")
    assert "KERAS_BACKEND must be one of jax, torch, tensorflow. Received: KERAS_BACKEND='theano'" in result.stderr


@pytest.mark.parametrize("installed, chosen", [(["torch"], "torch"), (["torch", "jax"], "jax")])
def test_without_tensorflow_an_installed_backend_is_taken(monkeypatch, tmp_path, installed, chosen):
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    backend._choose_backend()
    assert os.environ["KERAS_BACKEND"] == chosen


def test_no_backend_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install keras-vaultgemma\[jax\]"):
        backend._choose_backend()


def test_write_slice_leaves_rows_that_share_memory_apart():
    row = keras.ops.broadcast_to(keras.ops.zeros((1, 3, 1)), (2, 3, 1))
    written = backend.write_slice(row, keras.ops.convert_to_tensor(np.array([[[1.0]], [[2.0]]], "float32")), 1)
    np.testing.assert_array_equal(to_numpy(written)[:, :, 0], [[0, 1, 0], [0, 2, 0]])


def test_compiled_function_reads_variables_anew():
    variable = keras.Variable(np.ones(2, "float32"))
    double = backend.compile_function(lambda x: x * variable, [variable])
    x = keras.ops.convert_to_tensor(np.array([1.0, 2.0], "float32"))
    np.testing.assert_array_equal(to_numpy(double(x)), [1, 2])
    variable.assign([3.0, 4.0])
    np.testing.assert_array_equal(to_numpy(double(x)), [3, 8])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_variables_start_from_numpy_bit_by_bit(dtype):
    array = np.array([1.5, -0.0, np.inf, 3.0e-5], "float32").astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    variable = keras.Variable(lambda shape, dtype: backend.from_numpy(array), shape=(4,), dtype=dtype)
    assert variable.dtype == dtype
    np.testing.assert_array_equal(to_numpy(keras.ops.cast(variable.value, "float32")), array.astype("float32"))


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


def test_without_a_distribution_one_share_has_all_rows():
    rows = keras.ops.arange(6, dtype="float32")
    of_rows, total = backend.in_shares(lambda x, y: (x * y, keras.ops.sum(x)), rows, 2.0)
    assert to_numpy(of_rows).tolist() == [0, 2, 4, 6, 8, 10] and to_numpy(total) == 15


def test_without_a_distribution_every_process_saves_its_own():
    with backend.gathered([keras.Variable([1.0])]) as writes:
        assert writes
