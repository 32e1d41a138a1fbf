"""Names of presets as people type them."""

import json

import pytest
from hub_client import write_checkpoint

from keras_vaultgemma.checkpoints import names, presets

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("vaultgemma_1b", "vaultgemma_1b"),
        ("google/vaultgemma-1b", "hf://google/vaultgemma-1b"),
        ("vault_gemma_1b_en", "vaultgemma_1b"),
        ("https://huggingface.co/google/vaultgemma-1b", "hf://google/vaultgemma-1b"),
        ("https://huggingface.co/google/vaultgemma-1b/", "hf://google/vaultgemma-1b"),
        ("huggingface.co/google/vaultgemma-1b", "hf://google/vaultgemma-1b"),
        ("https://hf.co/me/mine/tree/v2", "hf://me/mine@v2"),
        ("https://huggingface.co/me/mine/blob/main/config.json", "hf://me/mine@main"),
        ("https://huggingface.co/me/mine?library=transformers", "hf://me/mine"),
        (
            "https://www.kaggle.com/models/google/vaultgemma/transformers/1b",
            "kaggle://google/vaultgemma/transformers/1b",
        ),
        (
            "https://www.kaggle.com/models/keras/vaultgemma/keras/vault_gemma_1b_en/2",
            "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2",
        ),
        ("hf://org/name@v1", "hf://org/name@v1"),
        ("some/other/folder", "some/other/folder"),
    ],
)
def test_canonical_names(typed, meant):
    assert names.canonical(typed) == meant


def test_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_checkpoint(tmp_path / "models/mine", 0)
    assert presets.find("~/models/mine") == folder


def test_an_existing_folder_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "google/vaultgemma-1b", 0)
    assert str(presets.find("google/vaultgemma-1b")) == "google/vaultgemma-1b"


@pytest.mark.parametrize(
    "typed, suggested",
    [
        ("google/vaultgemma-1b-pt", "Did you mean 'vaultgemma_1b'?"),
        ("google/vaultgemma", "Did you mean 'vaultgemma_1b'?"),
        ("vaultgemma-1b", "Did you mean 'vaultgemma_1b'?"),
        ("VaultGemma_1B", "Did you mean 'vaultgemma_1b'?"),
        ("vaultgema_tiny", "Did you mean 'vaultgemma_tiny'?"),
        ("me/my-model", "Did you mean 'hf://me/my-model'?"),
    ],
)
def test_the_right_name_is_suggested(typed, suggested):
    with pytest.raises(ValueError, match="`preset` must be a bundled preset") as error:
        presets.find(typed)
    assert f"{suggested} Received: preset={typed!r}" in str(error.value)


@pytest.mark.parametrize("typed", ["no/such/folder", "./mine", "elephant", "gs://bucket/model"])
def test_nothing_is_suggested_for_other_names(typed):
    with pytest.raises(ValueError) as error:
        presets.find(typed)
    assert "Did you mean" not in str(error.value)


def test_a_file_is_answered_with_its_folder(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match="That is a file; its folder is") as error:
        presets.find(tmp_path / "model.gguf")
    assert repr(str(tmp_path)) in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "vaultgemma_1b",
        "vault_gemma_1b_en",
        "google/vaultgemma-1b",
        "hf://google/vaultgemma-1b@main",
        "https://huggingface.co/google/vaultgemma-1b",
        "kaggle://google/vaultgemma/transformers/1b",
        "kaggle://google/vaultgemma/transformers/1b/1",
        "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en",
    ],
)
def test_every_name_of_the_release_has_its_statement(name):
    bundled = json.loads((presets.bundled()["vaultgemma_1b"] / "metadata.json").read_text())
    assert presets.release_metadata(name, 1_038_741_120) == bundled
    assert presets.release_metadata(name, 5) == {}


@pytest.mark.parametrize("name", ["kaggle://me/vaultgemma/transformers/1b", "me/vaultgemma-1b"])
def test_no_other_name_has_it(name):
    assert presets.release_metadata(name, 1_038_741_120) == {}
