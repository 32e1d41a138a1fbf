"""Folders that hold a model in another tool's files: what is there, and the cure."""

import json

import pytest
from hub_client import find, write_checkpoint
from hub_stub import HubStub

from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.hdf5_format import open_hdf5
from keras_vaultgemma.checkpoints.safetensors_format import open_safetensors
from keras_vaultgemma.checkpoints.vocabulary import read_vocabulary

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize(
    "files, found, cure",
    [
        (["vaultgemma-Q4_K_M.gguf"], "vaultgemma-Q4_K_M.gguf", "llama.cpp"),
        (["pytorch_model.bin"], "pytorch_model.bin", "save_pretrained"),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin", "a pickle"),
        (["consolidated.safetensors"], "consolidated.safetensors", "Hugging Face's format"),
        (["consolidated.00.pth"], "consolidated.00.pth", "Hugging Face's format"),
        (["model.fp16.safetensors"], "model.fp16.safetensors", "rename a single file to model.s"),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"],
            "model.fp16-00001-of-00002.safetensors",
            "variant=",
        ),
        (["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors", "index"),
        (["vaultgemma.safetensors"], "vaultgemma.safetensors", "rename"),
        (["adapter_model.safetensors"], "adapter_model.safetensors", "lora.load_adapter"),
        (["flax_model.msgpack"], "flax_model.msgpack", "save_pretrained"),
        (["model.keras"], "model.keras", "load_model"),
        (["notes.txt"], None, None),
    ],
)
def test_what_is_there_instead_of_weights(tmp_path, files, found, cure):
    folder = write_checkpoint(tmp_path / "folder", 0)
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).touch()
    with pytest.raises(FileNotFoundError, match="has no weights: none of model") as error:
        presets.find(folder)
    if found is None:
        assert "There is" not in str(error.value)
    else:
        assert f"There is {found}, " in str(error.value) and cure in str(error.value)


def test_a_folder_of_an_adapter_without_a_config(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no config\.json.*an adapter: load its base model"):
        presets.find(tmp_path)


def test_what_is_in_a_repository(tmp_path):
    """Files that are not downloaded."""
    folder = write_checkpoint(tmp_path / "repository", 0)
    (folder / "model.safetensors").rename(folder / "vaultgemma.gguf")
    with HubStub({"test/gguf": {"main": folder}}) as hub:
        answer = find("hf://test/gguf", env=hub.environment(tmp_path))
    assert answer["error"] == "FileNotFoundError"
    assert "There is vaultgemma.gguf, in llama.cpp's format" in answer["message"]


@pytest.mark.parametrize(
    "field, value, method",
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsand"),
        ("quantization_config", {"quant_method": "fp8"}, "by fp8"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "by compressed-tensors"),
        ("compression_config", {"format": "int-quantized"}, "by an unnamed method"),
    ],
)
def test_a_quantized_checkpoint_says_so(tmp_path, field, value, method):
    folder = write_checkpoint(tmp_path / "folder", 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match="this checkpoint is quantized") as error:
        read_config(folder)
    assert method in str(error.value) and "dequantize()" in str(error.value)


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_none(tmp_path, value):
    folder = write_checkpoint(tmp_path / "folder", 0)
    config = json.loads((folder / "config.json").read_text())
    before = read_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    assert read_config(folder) == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "model.weights.h5"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    """What `git clone` leaves without Git LFS."""
    path = write_checkpoint(tmp_path / "folder", 0) / name
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2077484096\n"
    path.write_text(pointer)
    read = {
        "model.safetensors": open_safetensors,
        "tokenizer.model": lambda path: read_vocabulary(path.parent),
        "model.weights.h5": open_hdf5,
    }[name]
    with pytest.raises(ValueError, match="git lfs pull") as error:
        read(path)
    assert str(path) in str(error.value)
