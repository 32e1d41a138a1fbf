import os
import subprocess
import sys

import pytest

from keras_vaultgemma import backend
from keras_vaultgemma.backend.selection import _select_backend


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.skipif(backend.NAME != "jax", reason="tests/test_startup.py has more on PyTorch")
def test_tensorflow_is_never_imported():
    """Not by the import, nor by loading, generating, fitting and saving."""
    result = run(
        "import sys, tempfile\n"
        "import keras_vaultgemma\n"
        "assert 'tensorflow' not in sys.modules, 'import'\n"
        "model = keras_vaultgemma.VaultGemmaCausalLM.from_preset('vaultgemma_tiny')\n"
        "model.generate('Once', max_new_tokens=2)\n"
        "model.fit(['Once upon a time'] * 2, batch_size=2, verbose=0)\n"
        "keras_vaultgemma.lora.add(model, rank=2)\n"
        "folder = tempfile.mkdtemp()\n"
        "keras_vaultgemma.lora.save_adapter(model, folder + '/adapter')\n"
        "model.save_to_preset(folder + '/preset')\n"
        "model.save(folder + '/model.keras')\n"
        "import keras, keras_hub\n"
        "keras.utils.set_random_seed(0)\n"
        "keras_hub.models.CausalLM.from_preset(folder + '/preset').get_config()\n"
        "loaded = [name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'tensorflow_text')]\n"
        "assert not loaded, loaded[:3]\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('tensorflow'), 'hidden for good, or the test says nothing'\n"
    )
    assert result.returncode == 0, result.stderr


def test_unknown_backend_is_named():
    result = run("from keras_vaultgemma import VaultGemmaCausalLM", KERAS_BACKEND="theano")
    assert (
        "KERAS_BACKEND must be one of jax, torch, tensorflow. Received: KERAS_BACKEND='theano'"
        in result.stderr
    )


@pytest.mark.parametrize("installed, chosen", [(["torch"], "torch"), (["torch", "jax"], "jax")])
def test_without_tensorflow_an_installed_backend_is_taken(monkeypatch, tmp_path, installed, chosen):
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name in installed else None
    )
    _select_backend()
    assert os.environ["KERAS_BACKEND"] == chosen


def test_no_backend_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'keras-vaultgemma\[jax\]'"):
        _select_backend()


@pytest.mark.parametrize("by", ["environment", "file"])
def test_a_chosen_backend_that_is_not_installed(monkeypatch, tmp_path, by):
    monkeypatch.setenv("KERAS_BACKEND", "torch" if by == "environment" else "")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    if by == "file":
        (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "jax" else None)
    with pytest.raises(
        ImportError, match=r"is 'torch'.*'keras-vaultgemma\[torch\]'`, or choose jax\."
    ):
        _select_backend()
