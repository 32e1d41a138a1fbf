"""Keyword arguments and dtype policies of `from_preset`."""

import json
import shutil

import keras
import pytest
from common import one_layer_preset, random_backbone

from keras_vaultgemma import (
    VaultGemmaBackbone,
    VaultGemmaCausalLM,
    VaultGemmaCausalLMPreprocessor,
    VaultGemmaTokenizer,
)

pytestmark = pytest.mark.first_backend

CLASSES = (
    VaultGemmaBackbone,
    VaultGemmaCausalLM,
    VaultGemmaCausalLMPreprocessor,
    VaultGemmaTokenizer,
)


@pytest.fixture(autouse=True)
def global_policy():
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "name, nearest",
    [("torch_dtype", "dtype"), ("dtpye", "dtype"), ("trainabel", "trainable"), ("name_", "name")],
)
def test_an_unknown_argument_is_named_with_the_nearest(cls, name, nearest):
    with pytest.raises(TypeError) as error:
        cls.from_preset("vaultgemma_tiny", **{name: "float32"})
    assert str(error.value) == (
        f"{cls.__name__}.from_preset has no argument `{name}`. Did you mean `{nearest}`?"
    )


@pytest.mark.parametrize(
    "cls, name, nearest",
    [
        (VaultGemmaCausalLM, "preprocesor", "preprocessor"),
        (VaultGemmaCausalLM, "num_layer", "num_layers"),
        (VaultGemmaCausalLMPreprocessor, "sequence_lenght", "sequence_length"),
        (VaultGemmaTokenizer, "add_boss", "add_bos"),
    ],
)
def test_arguments_of_one_class(cls, name, nearest):
    with pytest.raises(TypeError, match=f"`{name}`. Did you mean `{nearest}`"):
        cls.from_preset("vaultgemma_tiny", **{name: None})


def test_load_weight_is_no_argument():
    with pytest.raises(TypeError, match="`load_weight`. Did you mean `load_weights`"):
        VaultGemmaCausalLM.from_preset("vaultgemma_tiny", load_weight=False)


def test_an_argument_without_a_neighbour_gets_all_of_them():
    with pytest.raises(
        TypeError, match="`quantization_config`. It has attention_logit_soft_cap, backbone"
    ):
        VaultGemmaCausalLM.from_preset("vaultgemma_tiny", quantization_config=None)


def test_the_constructor_does_not_ignore_arguments():
    with pytest.raises(TypeError, match="VaultGemmaCausalLM has no argument `trainabel`"):
        VaultGemmaCausalLM(random_backbone(num_layers=1), trainabel=False)


def test_legal_arguments_still_work():
    preset = one_layer_preset()
    model = VaultGemmaCausalLM.from_preset(
        preset, preprocessor=None, name="mine", trainable=False, dtype="float16"
    )
    assert (model.name, model.preprocessor, model.trainable_variables) == ("mine", None, [])
    backbone = VaultGemmaBackbone.from_preset(preset, max_sequence_length=64, rope_theta=5000.0)
    assert (backbone.max_sequence_length, backbone.rope_theta) == (64, 5000.0)
    preprocessor = VaultGemmaCausalLMPreprocessor.from_preset(
        preset, sequence_length=8, add_end_token=False
    )
    assert (preprocessor.sequence_length, preprocessor.add_end_token) == (8, False)
    assert VaultGemmaTokenizer.from_preset(preset, add_bos=True)("Once")[0] == 2


@pytest.mark.parametrize("cls", [VaultGemmaBackbone, VaultGemmaCausalLM])
@pytest.mark.parametrize("changes", [dict(num_layers=2), dict(hidden_dim=64)])
def test_another_shape_needs_random_weights(cls, changes):
    ((name, value),) = changes.items()
    with pytest.raises(TypeError, match=f"`{name}` must be .*load_weights=False.*{name}={value}"):
        cls.from_preset(one_layer_preset(), **changes)
    made = cls.from_preset(one_layer_preset(), load_weights=False, **changes)
    assert getattr(getattr(made, "backbone", made), name) == value


def test_the_same_shape_may_be_named():
    assert VaultGemmaBackbone.from_preset(one_layer_preset(), num_layers=1).num_layers == 1


def test_arguments_of_the_backbone_contradict_a_backbone():
    with pytest.raises(TypeError, match="`dtype` belongs to the backbone"):
        VaultGemmaCausalLM.from_preset(
            one_layer_preset(), backbone=random_backbone(num_layers=1), dtype="bfloat16"
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of presets of one layer that were saved with different policies."""
    folder = tmp_path_factory.mktemp("saved")
    for policy in ("bfloat16", "mixed_bfloat16"):
        VaultGemmaBackbone.from_preset(one_layer_preset(), dtype=policy).save_to_preset(
            folder / policy
        )
    quantized = VaultGemmaBackbone.from_preset(one_layer_preset())
    quantized.quantize("int8")
    quantized.save_to_preset(folder / "int8")
    return folder


def policy_of(backbone):
    return backbone.transformer_layers[0].attention.query.dtype_policy


@pytest.mark.parametrize("cls", [VaultGemmaBackbone, VaultGemmaCausalLM])
@pytest.mark.parametrize("load_weights", [True, False])
def test_a_mixed_policy_is_kept_and_a_plain_one_follows_keras(saved, cls, load_weights):
    def load(name, **kwargs):
        if cls is VaultGemmaCausalLM:
            kwargs["preprocessor"] = None
        made = cls.from_preset(saved / name, load_weights=load_weights, **kwargs)
        return policy_of(getattr(made, "backbone", made)).name

    assert load("mixed_bfloat16") == "mixed_bfloat16"
    assert load("mixed_bfloat16", dtype=None) == "mixed_bfloat16"
    assert load("mixed_bfloat16", dtype="float32") == "float32"
    assert load("bfloat16") == "float32"
    keras.config.set_dtype_policy("bfloat16")
    assert load("mixed_bfloat16") == "mixed_bfloat16"
    assert load("bfloat16") == "bfloat16"


def test_a_mixed_policy_in_several_files_is_kept(tmp_path):
    mixed = VaultGemmaBackbone.from_preset(one_layer_preset(), dtype="mixed_bfloat16")
    mixed.save_to_preset(tmp_path, max_shard_size=0.004)
    assert not (tmp_path / "model.weights.h5").exists()
    assert policy_of(VaultGemmaBackbone.from_preset(tmp_path)).name == "mixed_bfloat16"


def test_a_quantized_policy_is_kept(saved):
    for load_weights in (True, False):
        loaded = VaultGemmaBackbone.from_preset(saved / "int8", load_weights=load_weights)
        assert loaded.transformer_layers[0].attention.query.quantization_mode == "int8"


def test_a_config_without_a_policy_follows_keras(tmp_path):
    shutil.copytree(one_layer_preset(), tmp_path / "preset")
    path = tmp_path / "preset" / "config.json"
    config = json.loads(path.read_text())
    del config["config"]["dtype"]
    path.write_text(json.dumps(config))
    assert policy_of(VaultGemmaBackbone.from_preset(tmp_path / "preset")).name == "float32"
