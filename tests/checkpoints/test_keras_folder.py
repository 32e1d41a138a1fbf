"""Keras presets that are written without a model, against what Keras saves and loads."""

import json

import h5py
import keras_hub
import numpy as np
import pytest
from common import RELEASE_LIKE, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM
from keras_vaultgemma.checkpoints.keras_folder import (
    BACKBONE_NAME,
    TASK_NAME,
    write_keras_config,
    write_keras_weights,
)
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.checkpoints.reader import open_values

JSON = ("config.json", "task.json", "preprocessor.json", "tokenizer.json")
VOCABULARY = "assets/tokenizer/vocabulary.spm"


def content(path):
    """{name: attributes of a group, or all there is of a dataset}."""
    found = {}

    def visit(name, item):
        found[name] = {key: str(value) for key, value in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            tag = item.id.get_type().get_tag() if item.dtype.kind == "V" else None
            found[name] = (
                found[name],
                item.shape,
                item.dtype,
                item.chunks,
                tag,
                item[()].tobytes(),
            )

    with h5py.File(path) as file:
        file.visititems(visit)
        return found, file.libver


def build(tiny, dtype, has_text, **changes):
    backbone = random_backbone(**{**RELEASE_LIKE, **changes}, dtype=dtype, name=BACKBONE_NAME)
    preprocessor = tiny.preprocessor if has_text else None
    return VaultGemmaCausalLM(backbone, preprocessor, name=TASK_NAME)


@pytest.mark.parametrize("has_text", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_what_keras_saves(tiny, tmp_path, dtype, has_text):
    sliding = dict(
        layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window_size=5
    )
    model = build(tiny, dtype, has_text, vocabulary_size=4096, final_logit_soft_cap=9.5, **sliding)
    model.save_to_preset(tmp_path / "saved")
    (tmp_path / "new").mkdir()
    hyperparameters, values = open_values(tmp_path / "saved")
    reported = []
    write_keras_config(tmp_path / "new", hyperparameters, DTYPES[dtype], model.preprocessor)
    write_keras_weights(
        tmp_path / "new",
        hyperparameters,
        values,
        DTYPES[dtype],
        reported.append,
    )
    names = {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*")}
    written = {path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*")}
    assert {str(name) for name in names - written} == {"metadata.json"} and not written - names
    for name in JSON if has_text else JSON[:2]:
        assert json.loads((tmp_path / "new" / name).read_text()) == json.loads(
            (tmp_path / "saved" / name).read_text()
        )
    if has_text:
        assert (tmp_path / "new" / VOCABULARY).read_bytes() == (
            tmp_path / "saved" / VOCABULARY
        ).read_bytes()
    assert content(tmp_path / "new/model.weights.h5") == content(
        tmp_path / "saved/model.weights.h5"
    )
    assert sum(reported) == model.backbone.count_params() * DTYPES[dtype].itemsize


@pytest.mark.first_backend
def test_this_package_and_keras_hub_load_it(tiny, tmp_path):
    model = build(tiny, "float32", True, vocabulary_size=4096)
    model.save_to_preset(tmp_path / "saved")
    (tmp_path / "new").mkdir()
    hyperparameters, values = open_values(tmp_path / "saved")
    write_keras_config(tmp_path / "new", hyperparameters, DTYPES["float32"], model.preprocessor)
    write_keras_weights(
        tmp_path / "new", hyperparameters, values, DTYPES["float32"], lambda count: None
    )
    model.save_to_preset(tmp_path / "saved")
    metadata = (tmp_path / "saved/metadata.json").read_bytes()
    assert json.loads(metadata)["tasks"] == ["CausalLM"]
    (tmp_path / "new/metadata.json").write_bytes(metadata)
    for load in (VaultGemmaCausalLM.from_preset, keras_hub.models.CausalLM.from_preset):
        loaded = load(str(tmp_path / "new"))
        assert type(loaded) is VaultGemmaCausalLM
        for ours, theirs in zip(loaded.backbone.variables, model.backbone.variables, strict=True):
            assert np.array_equal(to_numpy(ours.value), to_numpy(theirs.value)), ours.path
        assert loaded.generate("Once", max_new_tokens=3) == model.generate("Once", max_new_tokens=3)
    assert type(VaultGemmaBackbone.from_preset(tmp_path / "new")) is VaultGemmaBackbone
