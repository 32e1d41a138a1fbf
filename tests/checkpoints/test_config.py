"""config.json as other libraries write it, compared with the libraries."""

import inspect
import json

import pytest
import transformers

from keras_vaultgemma import VaultGemmaBackbone
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.config import (
    KERAS_FIELDS,
    keras_policy,
    read_config,
)

pytestmark = pytest.mark.any_backend

HUB = dict(
    vocabulary_size=256000,
    num_layers=4,
    num_query_heads=4,
    num_key_value_heads=4,
    hidden_dim=1152,
    intermediate_dim=13824,
    head_dim=256,
    layer_norm_epsilon=1e-6,
    dropout=0,
    query_head_dim_normalize=True,
    use_post_ffw_norm=False,
    use_post_attention_norm=False,
    final_logit_soft_cap=None,
    attention_logit_soft_cap=None,
    sliding_window_size=512,
    use_sliding_window_attention=False,
)


def hugging_face(folder, **fields):
    (folder / "config.json").write_text(json.dumps({"model_type": "vaultgemma", **fields}))
    return folder


def keras_hub(folder, name="keras_hub>GemmaBackbone", without=(), **fields):
    config = {key: value for key, value in {**HUB, **fields}.items() if key not in without}
    (folder / "config.json").write_text(json.dumps({"registered_name": name, "config": config}))
    return folder


CASES = {
    "nothing but defaults": {},
    "the release": dict(
        num_hidden_layers=3,
        hidden_size=1152,
        intermediate_size=6912,
        num_attention_heads=4,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention"] * 3,
        sliding_window=512,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        attention_bias=False,
        attention_dropout=0.0,
    ),
    "every number another": dict(
        vocab_size=300,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_size=48,
        intermediate_size=100,
        head_dim=10,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=10.5,
        sliding_window=5,
        rms_norm_eps=1e-5,
        max_position_embeddings=77,
        initializer_range=0.3,
    ),
    "layer types null": dict(layer_types=None, num_hidden_layers=5),
    "layer types mixed": dict(
        layer_types=["sliding_attention"] * 2 + ["full_attention"], num_hidden_layers=3
    ),
    "theta at the top": dict(rope_theta=777.0),
    "theta in rope_parameters": dict(rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
    "theta in both": dict(
        rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 777.0}
    ),
    "theta next to rope_parameters": dict(
        rope_theta=777.0, rope_parameters={"rope_type": "default"}
    ),
    "rope_parameters null": dict(rope_parameters=None),
    "rope_scaling null": dict(rope_scaling=None, rope_theta=777.0),
    "rope_scaling of the default type": dict(rope_scaling={"type": "default"}, rope_theta=777.0),
    "rope_scaling over rope_parameters": dict(
        rope_scaling={"rope_type": "default", "rope_theta": 5.0},
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_field_agrees_with_transformers(tmp_path, case):
    folder = hugging_face(tmp_path, **CASES[case])
    theirs = transformers.VaultGemmaConfig.from_pretrained(folder)
    assert read_config(folder) == dict(
        vocabulary_size=theirs.vocab_size,
        num_layers=theirs.num_hidden_layers,
        num_query_heads=theirs.num_attention_heads,
        num_key_value_heads=theirs.num_key_value_heads,
        hidden_dim=theirs.hidden_size,
        intermediate_dim=theirs.intermediate_size,
        head_dim=theirs.head_dim,
        query_pre_attn_scalar=theirs.query_pre_attn_scalar,
        attention_logit_soft_cap=theirs.attn_logit_softcapping,
        final_logit_soft_cap=theirs.final_logit_softcapping,
        layer_types=theirs.layer_types,
        sliding_window_size=theirs.sliding_window,
        rope_theta=theirs.rope_parameters["rope_theta"],
        layer_norm_epsilon=theirs.rms_norm_eps,
        max_sequence_length=theirs.max_position_embeddings,
        initializer_range=theirs.initializer_range,
    )


def test_a_config_that_transformers_saved(tmp_path):
    theirs = transformers.VaultGemmaConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 123.0}
    )
    theirs.save_pretrained(tmp_path)
    arguments = read_config(tmp_path)
    assert arguments["rope_theta"] == 123.0
    assert arguments["layer_types"] == ["sliding_attention", "full_attention"] * 13


WRONG = [
    ("model_type", "gemma2", "'vaultgemma'"),
    ("model_type", None, "'vaultgemma'"),
    ("hidden_activation", "relu", "'gelu_pytorch_tanh'"),
    ("hidden_activation", "gelu", "'gelu_pytorch_tanh'"),
    ("hidden_activation", None, "'gelu_pytorch_tanh'"),
    ("attention_bias", True, "false"),
    ("attention_bias", "false", "false"),
    ("tie_word_embeddings", False, "true"),
    ("tie_word_embeddings", None, "true"),
    ("attention_dropout", "0.1", "null or a number from 0 to 1"),
    ("attn_logit_softcapping", 0, "null or a finite number above 0"),
    ("attn_logit_softcapping", "50", "null or a finite number above 0"),
    ("final_logit_softcapping", -30.0, "null or a finite number above 0"),
    ("final_logit_softcapping", [30.0], "null or a finite number above 0"),
    ("final_logit_softcapping", False, "null or a finite number above 0"),
    ("rms_norm_eps", "1e-6", "a finite number above 0"),
    ("rms_norm_eps", float("nan"), "a finite number above 0"),
    ("rms_norm_eps", float("inf"), "a finite number above 0"),
    ("initializer_range", 10**400, "a finite number above 0"),
    ("query_pre_attn_scalar", None, "a finite number above 0"),
    ("query_pre_attn_scalar", True, "a finite number above 0"),
    ("query_pre_attn_scalar", {}, "a finite number above 0"),
    ("layer_types", "full_attention", "null or a list of 26"),
    ("layer_types", ["full_attention"] * 25, "null or a list of 26"),
    ("layer_types", ["full_attention"] * 25 + ["chunked_attention"], "null or a list of 26"),
    ("layer_types", ["full_attention"] * 25 + [["sliding_attention"]], "null or a list of 26"),
    ("sliding_window", None, "or null if no layer slides"),
    ("sliding_window", 0, "or null if no layer slides"),
    ("sliding_window", "512", "or null if no layer slides"),
    ("rope_theta", "10000", "a finite number above 0"),
    ("rope_theta", None, "a finite number above 0"),
    ("rope_parameters", {"rope_type": "linear", "factor": 2.0}, "of the rope_type 'default'"),
    ("rope_parameters", {"rope_type": "default", "factor": 2.0}, "of the rope_type 'default'"),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "of the rope_type 'default'"),
    ("rope_parameters", [1], "of the rope_type 'default'"),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "of the rope_type 'default'"),
] + [
    (field, value, "an integer from 1 to 2147483647")
    for field in (
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "max_position_embeddings",
    )
    for value in (None, 0, -1, 4.0, "4", True, [4], 2**31)
]
WRONG += [
    ("num_hidden_layers", value, "an integer from 1 to 1000")
    for value in (None, 0, 4.0, True, 1001, 2**31)
]


@pytest.mark.parametrize(("field", "value", "legal"), WRONG)
def test_a_field_out_of_range_is_named(tmp_path, field, value, legal):
    with pytest.raises(ValueError) as error:
        read_config(hugging_face(tmp_path, **{field: value}))
    for part in (
        str(tmp_path / "config.json"),
        f"`{field}` must be ",
        legal,
        f"Received: {repr(value)[:50]}",
    ):
        assert part in str(error.value)


def test_a_wrong_theta_in_rope_parameters_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"`rope_theta` must be a finite number above 0. Received: 'x'"
    ):
        read_config(hugging_face(tmp_path, rope_theta=1.0, rope_parameters={"rope_theta": "x"}))


def test_the_window_may_be_null_if_no_layer_slides(tmp_path):
    folder = hugging_face(
        tmp_path, num_hidden_layers=2, layer_types=["full_attention"] * 2, sliding_window=None
    )
    assert read_config(folder)["sliding_window_size"] is None


def test_dropout_is_ignored_with_a_warning(tmp_path):
    folder = hugging_face(tmp_path, attention_dropout=0.1, num_hidden_layers=2)
    with pytest.warns(UserWarning, match="`attention_dropout` is ignored"):
        assert read_config(folder)["num_layers"] == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\ud800"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, errors="surrogatepass")
    with pytest.raises(ValueError, match=r"config.json"):
        read_config(tmp_path)


def test_keras_hub_config(tmp_path):
    assert read_config(keras_hub(tmp_path)) == dict(
        vocabulary_size=256000,
        num_layers=4,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=1152,
        intermediate_dim=6912,
        head_dim=256,
        attention_logit_soft_cap=None,
        final_logit_soft_cap=None,
        sliding_window_size=512,
        layer_norm_epsilon=1e-6,
        # What keras-hub's class does not have, and the backbone's defaults are.
        query_pre_attn_scalar=256,
        layer_types=["full_attention"] * 4,
        rope_theta=10_000.0,
        max_sequence_length=1024,
        initializer_range=0.02,
    )
    arguments = read_config(
        keras_hub(tmp_path, use_sliding_window_attention=True, attention_logit_soft_cap=50.0)
    )
    assert arguments["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert arguments["attention_logit_soft_cap"] == 50.0


def test_keras_hub_config_of_an_older_version_takes_its_defaults(tmp_path):
    needed = (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "num_key_value_heads",
        "hidden_dim",
        "head_dim",
    )
    optional = HUB.keys() - {*needed, "intermediate_dim"}
    expected = {**read_config(keras_hub(tmp_path)), "sliding_window_size": 4096}
    assert read_config(keras_hub(tmp_path, without=optional)) == expected
    small = {**dict.fromkeys(needed, 2), "intermediate_dim": 8}
    backbone = VaultGemmaBackbone(**read_config(keras_hub(tmp_path, without=optional, **small)))
    assert (backbone.query_pre_attn_scalar, backbone.rope_theta, backbone.max_sequence_length) == (
        2,
        10_000.0,
        1024,
    )


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("use_post_ffw_norm", True, "false"),
        ("use_post_attention_norm", True, "false"),
        ("dropout", 0.1, "0"),
        ("dropout", "0", "0"),
        ("query_head_dim_normalize", False, "true"),
        ("layer_norm_epsilon", 1e-5, "1e-6"),
        ("intermediate_dim", 13825, "an even integer above 0"),
        ("intermediate_dim", None, "an even integer above 0"),
        ("hidden_dim", None, "an integer from 1"),
        ("head_dim", "256", "an integer from 1"),
        ("num_layers", 2.0, "an integer from 1"),
        ("sliding_window_size", None, "an integer from 1"),
        ("use_sliding_window_attention", 1, "true or false"),
        ("final_logit_soft_cap", "30", "null or a finite number above 0"),
    ],
)
def test_a_keras_hub_field_out_of_range_is_named(tmp_path, field, value, legal):
    with pytest.raises(ValueError) as error:
        read_config(keras_hub(tmp_path, **{field: value}))
    assert f"{tmp_path / 'config.json'}: `{field}` must be {legal}" in str(error.value)
    assert f"Received: {value!r}" in str(error.value)


@pytest.mark.parametrize("name", ["keras_hub>Gemma3Backbone", "", None, 5])
def test_another_keras_hub_class_is_named(tmp_path, name):
    with pytest.raises(ValueError, match="`registered_name` must be 'keras_hub>GemmaBackbone'"):
        read_config(keras_hub(tmp_path, name))


def test_a_keras_hub_config_without_its_arguments(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"registered_name": "keras_hub>GemmaBackbone", "config": [1]})
    )
    with pytest.raises(ValueError, match=r"`config` must be an object. Received: \[1\]"):
        read_config(tmp_path)


# This package's own presets.

OWN = dict(
    vocabulary_size=96,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=48,
    intermediate_dim=80,
    head_dim=8,
)


def own_config(folder, **fields):
    config = {"registered_name": "keras_vaultgemma>VaultGemmaBackbone", "config": {**OWN, **fields}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_defaults_are_the_backbones():
    parameters = inspect.signature(VaultGemmaBackbone).parameters
    assert {*KERAS_FIELDS} == {*parameters} - {"dtype", "kwargs", "initial_values"}
    for name, (argument, default, _) in KERAS_FIELDS.items():
        given = parameters[name].default
        assert argument == name
        assert default == (None if given is inspect.Parameter.empty else given)


def test_a_saved_backbone_is_read_back(tmp_path):
    backbone = VaultGemmaBackbone(
        **{**OWN, "layer_types": ["sliding_attention", "full_attention"], "sliding_window_size": 3},
        query_pre_attn_scalar=7.5,
        final_logit_soft_cap=30,
        rope_theta=777.0,
        name="mine",
        trainable=False,
        dtype="bfloat16",
    )
    backbone.save_to_preset(tmp_path / "saved")
    built = {
        k: v for k, v in backbone.get_config().items() if k not in ("name", "trainable", "dtype")
    }
    assert read_config(tmp_path / "saved") == built
    assert keras_policy(tmp_path / "saved") == "bfloat16"
    assert presets.names_a_class(tmp_path / "saved")
    assert not presets.names_a_class(hugging_face(tmp_path))


def test_absent_fields_take_the_backbones_defaults(tmp_path):
    built = VaultGemmaBackbone(**OWN).get_config()
    assert read_config(own_config(tmp_path)) == {k: built[k] for k in KERAS_FIELDS}


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("num_layers", 1001, "an integer from 1 to 1000"),
        ("hidden_dim", None, "an integer from 1"),
        ("layer_types", ["full_attention"], "null or a list of 2"),
        ("layer_types", ["sliding_attention"] * 2, None),
        ("rope_theta", 0, "a finite number above 0"),
        ("attention_logit_soft_cap", -1, "null or a finite number above 0"),
        ("num_query_heads", 5, "a multiple of the number of key-value heads, 2"),
        ("head_dim", 7, "even"),
        ("colour", "red", "absent, because the backbone has no such argument"),
    ],
)
def test_a_field_of_a_keras_preset_out_of_range_is_named(tmp_path, field, value, legal):
    with pytest.raises(ValueError) as error:
        read_config(own_config(tmp_path, **{field: value}))
    named = "sliding_window_size" if legal is None else field
    assert f"{tmp_path / 'config.json'}: `{named}` must be {legal or 'an integer from 1'}" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        ("float16", "float16"),
        ({"class_name": "DTypePolicy", "config": {"name": "mixed_bfloat16"}}, "mixed_bfloat16"),
        ({"class_name": "DTypePolicyMap", "config": {}}, None),
        ({"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8"}}, None),
        ({"class_name": "DTypePolicy"}, None),
    ],
)
def test_the_policy_of_a_keras_preset(tmp_path, dtype, policy):
    assert keras_policy(own_config(tmp_path, dtype=dtype)) == policy


def test_a_policy_without_a_name_raises(tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be the name of a dtype policy. Received: 5"):
        keras_policy(own_config(tmp_path, dtype=5))


# Gemma 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", None),
        ("hidden_activation", None, None),
        ("hidden_activation", "relu", "'gelu_pytorch_tanh', or null or 'gelu'"),
        ("use_bidirectional_attention", True, "null or false"),
        ("head_dim", 7, "even"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "null, or of the rope_type 'default'"),
    ],
)
def test_the_config_of_gemma(tmp_path, field, value, message):
    config = {"model_type": "gemma", "num_hidden_layers": 2, "head_dim": 64, field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message:
        with pytest.raises(ValueError, match=f"`{field}` must be {message}"):
            read_config(tmp_path)
        return
    arguments = read_config(tmp_path)
    assert (arguments["query_pre_attn_scalar"], arguments["num_query_heads"]) == (64, 16)
    assert arguments["layer_types"] == ["full_attention"] * 2
    assert arguments["final_logit_soft_cap"] is arguments["sliding_window_size"] is None
