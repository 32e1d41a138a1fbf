"""Names and handles of presets: bundled, local, and from local stand-ins for the hubs."""

import json
import time
from pathlib import Path

import keras
import pytest
from common import random_backbone
from hub_client import assert_same_weights, content, find
from hub_stub import TOKEN

from keras_vaultgemma import VaultGemmaBackbone
from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import hubs, presets
from keras_vaultgemma.checkpoints.config import read_config

pytestmark = pytest.mark.any_backend

# vaultgemma_1b


def test_release_is_described_by_the_bundled_preset():
    config = read_json(presets.find("vaultgemma_1b", "config") / "config.json")
    assert config["registered_name"] == "keras_vaultgemma>VaultGemmaBackbone"
    assert config["config"]["dtype"]["config"]["name"] == "bfloat16"
    c = config["config"]
    attention = 4 * c["hidden_dim"] * c["num_query_heads"] * c["head_dim"]
    block = attention + 3 * c["hidden_dim"] * c["intermediate_dim"] + 2 * c["hidden_dim"]
    count = c["vocabulary_size"] * c["hidden_dim"] + c["num_layers"] * block + c["hidden_dim"]
    metadata = read_json(presets.find("vaultgemma_1b", "config") / "metadata.json")
    assert count == metadata["parameter_count"] == 1_038_741_120
    privacy = metadata["privacy"]
    assert (privacy["epsilon"], privacy["delta"], privacy["noise_multiplier"]) == (
        2.0,
        1.1e-10,
        0.614,
    )
    assert privacy["unit"] == "one sequence of 1024 consecutive tokens"


def test_the_bundled_config_equals_that_of_the_release(tmp_path):
    release = dict(
        model_type="vaultgemma",
        vocab_size=256000,
        hidden_size=1152,
        num_hidden_layers=26,
        intermediate_size=6912,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention"] * 26,
        sliding_window=512,
        max_position_embeddings=1024,
        rope_theta=10000,
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
    )
    (tmp_path / "config.json").write_text(json.dumps(release))
    config = read_json(presets.find("vaultgemma_1b", "config") / "config.json")["config"]
    read = read_config(tmp_path)
    assert read == {name: config[name] for name in read}


def test_bundled_config_has_every_argument_that_saving_writes(tmp_path):
    random_backbone(num_layers=1, name="vaultgemma_1b").save_to_preset(tmp_path)
    saved = read_json(tmp_path / "config.json")
    bundled = read_json(presets.find("vaultgemma_1b", "config") / "config.json")
    assert list(saved) == list(bundled)
    assert list(saved["config"]) == list(bundled["config"])


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="only PyTorch has a device without memory"
)
def test_vaultgemma_1b_builds_without_weights():
    with keras.device("meta"):
        backbone = VaultGemmaBackbone.from_preset(
            "vaultgemma_1b", load_weights=False, dtype="bfloat16"
        )
    assert backbone.count_params() == 1_038_741_120
    assert backbone.name == "vaultgemma_1b"
    assert {v.dtype for v in backbone.weights} == {"bfloat16"}


@pytest.mark.parametrize("subfolder", ["vaultgemma_1b", "."])
def test_weights_in_the_users_folder_are_found(checkpoints, tmp_path, monkeypatch, subfolder):
    home = tmp_path if subfolder == "vaultgemma_1b" else tmp_path / "vaultgemma_1b"
    (tmp_path / "vaultgemma_1b").symlink_to(checkpoints["v2"])
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(home))
    weights = VaultGemmaBackbone.from_preset("vaultgemma_1b").get_weights()
    assert_same_weights(weights, VaultGemmaBackbone.from_preset(checkpoints["v2"]).get_weights())


def test_users_folder_is_in_the_cache_unless_named(monkeypatch):
    monkeypatch.delenv("KERAS_VAULTGEMMA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert presets.cache_home() == Path("/caches/keras_vaultgemma")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/users/somebody")
    assert presets.cache_home() == Path("/users/somebody/.cache/keras_vaultgemma")
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", "~/models")
    assert presets.cache_home() == Path("/users/somebody/models")


def test_weights_come_from_hugging_face_once_the_terms_are_accepted(hub, tmp_path):
    answer = find("vaultgemma_1b", env=hub.environment(tmp_path, HF_TOKEN=TOKEN))
    assert content(answer["folder"]).keys() == {"config.json", "model.safetensors"}
    assert hub.commit("google/vaultgemma-1b") in answer["folder"]


@pytest.mark.parametrize("reason", ["gated", "no network", "HF_HUB_OFFLINE"])
def test_one_error_names_three_ways_to_get_weights(hub, tmp_path, reason):
    changes = {
        "gated": {},
        "no network": {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "HF_HUB_OFFLINE": {reason: "1"},
    }
    start = time.monotonic()
    answer = find("vaultgemma_1b", env=hub.environment(tmp_path, **changes[reason]))
    assert time.monotonic() - start < hubs.TIMEOUT
    assert answer["error"] == "FileNotFoundError"
    message = answer["message"]
    assert "gated" in message
    assert "https://huggingface.co/google/vaultgemma-1b" in message and "hf auth login" in message
    assert (
        "https://www.kaggle.com/models/keras/vaultgemma" in message
        and "KAGGLE_API_TOKEN" in message
    )
    folder = tmp_path / ".cache/keras_vaultgemma/vaultgemma_1b"
    assert (
        "hf download google/vaultgemma-1b --local-dir" in message
        and f"copy that folder to {folder}" in message
    )
    attempts = message.partition("Attempts so far:")[2].strip().splitlines()
    starts = [
        str(folder),
        "hf://google/vaultgemma-1b",
        "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2",
    ]
    assert len(attempts) == 3
    assert all(line.startswith(f"- {start} ") for line, start in zip(attempts, starts, strict=True))
    expected = {
        "gated": "is gated",
        "no network": "the hub is unreachable",
        "HF_HUB_OFFLINE": "offline mode is enabled",
    }
    assert expected[reason] in attempts[1]
    assert not (tmp_path / ".cache/keras_vaultgemma").exists()


# Folders


@pytest.mark.parametrize(
    "preset", ["vaultgemma_2b", "no/such/folder", "", "gs://bucket/model", "\0", None, 3, b"x"]
)
def test_unknown_preset(preset):
    with pytest.raises(ValueError, match="`preset` must be a bundled preset") as caught:
        VaultGemmaBackbone.from_preset(preset)
    assert "(vaultgemma_1b, vaultgemma_tiny), a folder, hf://" in str(caught.value)
    assert str(caught.value).endswith(f"Received: preset={preset!r}")


def test_file_is_no_preset(checkpoints):
    with pytest.raises(ValueError, match="`preset` must be a bundled preset"):
        presets.find(checkpoints["main"] / "config.json")


def test_folder_without_config(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"has no config\.json, so it is neither a preset nor"):
        VaultGemmaBackbone.from_preset(tmp_path)


def test_folder_without_weights(checkpoints, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoints["main"] / "config.json").read_bytes())
    with pytest.raises(
        FileNotFoundError, match=r"has no weights: none of model\.weights\.h5, .* exists"
    ):
        VaultGemmaBackbone.from_preset(tmp_path)
    assert presets.find(tmp_path, "config") == tmp_path


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "must hold a JSON object. Received: list"),
    ],
)
def test_config_that_is_not_a_json_object(checkpoints, tmp_path, text, message):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        VaultGemmaBackbone.from_preset(tmp_path)
    assert f"{tmp_path / 'config.json'} {message}" in str(caught.value)


def test_is_keras(checkpoints, tmp_path):
    assert presets.is_keras(presets.find("vaultgemma_tiny"))
    assert not presets.is_keras(checkpoints["main"])
    for name in (None, 1, "keras_hub>GemmaBackbone"):
        (tmp_path / "config.json").write_text(json.dumps({"registered_name": name}))
        assert not presets.is_keras(tmp_path)
