"""Descriptions of presets, as `keras-vaultgemma info` prints them."""

import json
from pathlib import Path

import pytest
from common import table

from keras_vaultgemma import VaultGemmaBackbone
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.recipes.describe import describe

pytestmark = pytest.mark.any_backend


@pytest.fixture
def no_model(monkeypatch):
    """Fail if a backbone is built."""

    def walk(self, *args, **kwargs):
        raise AssertionError("built a model")

    monkeypatch.setattr(VaultGemmaBackbone, "walk", walk)


def test_the_bundled_model(tiny, no_model):
    sections = table(describe("vaultgemma_tiny"))
    assert sections["Architecture"]["hidden_dim"] == "256"
    assert sections["Architecture"]["layer_types"] == "4 x full_attention"
    assert sections["Architecture"]["final_logit_soft_cap"] == "None"
    assert sections["Parameters"] == {
        "count": f"{tiny.backbone.count_params():,}",
        "in float32": "22.6 MB",
        "in bfloat16": "11.3 MB",
    }
    assert sections["Tokenizer"] == {
        "pieces": "4096",
        "<pad>": "0",
        "<eos>": "1",
        "<bos>": "2",
        "<start_of_turn>": "106",
        "<end_of_turn>": "107",
    }
    assert sections["Privacy"] == {"not privately trained": ""}


def test_the_release_needs_no_weights(monkeypatch, tmp_path, no_model):
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path))
    sections = table(describe("vaultgemma_1b"))
    assert sections["Architecture"]["num_layers"] == "26"
    assert sections["Architecture"]["layer_types"] == "26 x full_attention"
    assert sections["Parameters"]["count"] == "1,038,741,120"
    assert sections["Parameters"]["in bfloat16"] == "2,077.5 MB"
    assert sections["Tokenizer"] == {"no vocabulary": ""}
    assert sections["Privacy"]["epsilon"] == "2.0"
    assert sections["Privacy"]["delta"] == "1.1e-10"
    assert sections["Privacy"]["unit"] == "one sequence of 1024 consecutive tokens"
    assert sections["Privacy"]["mechanism"].startswith("DP-SGD")


@pytest.mark.parametrize(
    "has_vocabulary, needs", [(True, ["vocabulary"]), (False, ["vocabulary", "config"])]
)
def test_a_repository_downloads_its_vocabulary(monkeypatch, has_vocabulary, needs):
    folders, asked_for = presets.bundled(), []

    def find(preset, need):
        if isinstance(preset, Path):
            return preset
        asked_for.append(need)
        if need == "vocabulary" and not has_vocabulary:
            raise FileNotFoundError(f"{preset} has no vocabulary")
        return folders["vaultgemma_tiny" if has_vocabulary else "vaultgemma_1b"]

    monkeypatch.setattr(presets, "find", find)
    sections = table(describe("hf://org/name"))
    assert asked_for == needs
    assert ("no vocabulary" in sections["Tokenizer"]) is not has_vocabulary
    assert ("pieces" in sections["Tokenizer"]) is has_vocabulary


HUGGING_FACE = dict(
    model_type="vaultgemma",
    vocab_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_size=48,
    intermediate_size=80,
    head_dim=8,
    sliding_window=5,
    rope_parameters=dict(rope_type="default", rope_theta=5000.0),
)
KERAS_HUB = dict(
    registered_name="keras_hub>GemmaBackbone",
    config=dict(
        vocabulary_size=96,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=48,
        intermediate_dim=160,
        head_dim=8,
    ),
)


@pytest.mark.parametrize(
    "config, layer_types",
    [
        (HUGGING_FACE, "2 x sliding_attention, 1 x full_attention"),
        (KERAS_HUB, "2 x full_attention"),
    ],
)
def test_other_formats(tmp_path, config, layer_types):
    (tmp_path / "config.json").write_text(json.dumps(config))
    sections = table(describe(str(tmp_path)))
    backbone = VaultGemmaBackbone.from_preset(tmp_path, load_weights=False)
    built = {
        k: str(v)
        for k, v in backbone.get_config().items()
        if k not in ("name", "trainable", "dtype")
    }
    assert sections["Architecture"] == {**built, "layer_types": layer_types}
    assert sections["Parameters"]["count"] == f"{backbone.count_params():,}"
    assert sections["Tokenizer"] == {"no vocabulary": ""}
    assert sections["Privacy"] == {"no statement": ""}


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "`config` must be an object. Received: None"),
        ({"config": {"num_layers": 3}}, "`vocabulary_size` must be an integer from 1"),
        ({"config": 3}, "`config` must be an object. Received: 3"),
    ],
)
def test_a_malformed_preset(tmp_path, config, message):
    config["registered_name"] = "keras_vaultgemma>VaultGemmaBackbone"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        describe(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}")
