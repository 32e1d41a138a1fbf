"""What precedes the import of Keras: the choice of the backend, and the guard against TensorFlow."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import keras_vaultgemma
from keras_vaultgemma import _startup, backend

ROOT = Path(keras_vaultgemma.__file__).parents[1]


def run(code, *arguments, **environment):
    """Run Python code, or a file, in a new process."""
    start = [str(code)] if isinstance(code, Path) else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


needs_tensorflow = pytest.mark.skipif(
    "tensorflow" not in _startup.installed_backends(), reason="TensorFlow is not installed"
)


@needs_tensorflow
@pytest.mark.any_backend
@pytest.mark.skipif(backend.NAME == "tensorflow", reason="there TensorFlow is the point")
def test_nothing_public_imports_tensorflow():
    done = run(ROOT / "tests" / "tensorflow_walk.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("nothing has imported TensorFlow\n")


@needs_tensorflow
@pytest.mark.any_backend
@pytest.mark.skipif("torch" not in _startup.installed_backends(), reason="needs PyTorch")
def test_tensorflow_is_hidden_from_questions_alone(tmp_path):
    """Others find it, a feature of Keras that needs it imports it, and from then on Keras knows of it.

    Nothing is configured and JAX is hidden, as if it were not installed, so that the backend is PyTorch.
    """
    done = run(
        "import sys; sys.modules['jax'] = None\n"
        "import importlib.util, keras_vaultgemma, keras\n"
        "assert keras.config.backend() == 'torch'\n"
        "from keras_vaultgemma import VaultGemmaCausalLMPreprocessor\n"
        "preprocessor = VaultGemmaCausalLMPreprocessor.from_preset('vaultgemma_tiny')\n"
        "keras.utils.set_random_seed(0)\n"
        "assert importlib.util.find_spec('tensorflow')\n"
        "keras.utils.set_random_seed(0)\n"
        "assert 'tensorflow' not in sys.modules\n"
        "keras.callbacks.TensorBoard('logs').summary\n"
        "assert 'tensorflow' in sys.modules\n"
        "import tensorflow as tf\n"
        "keras.utils.set_random_seed(7)\n"
        "first = float(tf.random.uniform(()))\n"
        "keras.utils.set_random_seed(7)\n"
        "assert first == float(tf.random.uniform(()))\n"
        "keras.layers.StringLookup(vocabulary=['a'])\n"
        "dataset = tf.data.Dataset.from_tensor_slices(['Once', 'Twice']).batch(2)\n"
        "(x, y, weights), = dataset.map(preprocessor)\n"
        "assert x['token_ids'].shape == (2, preprocessor.sequence_length)\n",
        KERAS_BACKEND="",
        KERAS_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def unconfigured(monkeypatch, tmp_path):
    """An environment in which nothing is configured. Returns the folder of keras.json and a function that sets what is installed."""
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "keras")

    def install(*names):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: name if name in names else None
        )

    return tmp_path, install


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "installed, chosen",
    [
        ("torch tensorflow", "torch"),
        ("jax tensorflow", "jax"),
        ("jax torch tensorflow", ""),
        ("tensorflow", ""),
        ("torch", "torch"),
        ("jax torch", "jax"),
        ("", ""),
    ],
)
def test_the_one_backend_beside_tensorflow_is_chosen(unconfigured, installed, chosen):
    unconfigured[1](*installed.split())
    _startup.choose_backend()
    assert os.environ["KERAS_BACKEND"] == chosen


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "config, chosen",
    [
        ({"backend": "tensorflow", "floatx": "float32"}, "torch"),
        ({"floatx": "float32"}, "torch"),
        ({"backend": "jax"}, ""),
        ({"backend": "openvino"}, ""),
        (["backend"], "torch"),
    ],
)
def test_a_keras_json_counts_unless_keras_wrote_it(unconfigured, config, chosen):
    folder, install = unconfigured
    install("torch", "tensorflow")
    (folder / "keras.json").write_text(json.dumps(config))
    _startup.choose_backend()
    assert os.environ["KERAS_BACKEND"] == chosen


@pytest.mark.any_backend
def test_a_module_without_a_spec_counts(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    assert "torch" in _startup.installed_backends()


@pytest.mark.any_backend
def test_the_environment_counts(unconfigured, monkeypatch):
    unconfigured[1]("torch", "tensorflow")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    _startup.choose_backend()
    assert os.environ["KERAS_BACKEND"] == "tensorflow"


@pytest.mark.any_backend
def test_keras_that_is_imported_has_its_backend(unconfigured, monkeypatch):
    unconfigured[1]("torch", "tensorflow")
    monkeypatch.setitem(sys.modules, "keras", None)
    _startup.choose_backend()
    assert os.environ["KERAS_BACKEND"] == ""
