import warnings

import keras
import keras_hub
import numpy as np
import pytest
import reference
from common import RELEASE_LIKE, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM
from keras_vaultgemma.layers.attention import segment_positions

VARIANTS = {
    "release-like": {},
    "grouped heads, caps, sliding": dict(
        num_key_value_heads=2,
        attention_logit_soft_cap=3.0,
        final_logit_soft_cap=5.0,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window_size=4,
        query_pre_attn_scalar=9,
        rope_theta=300.0,
    ),
}
ROW = [2, 17, 5, 99, 100, 31, 8, 77, 3, 64, 12]


@pytest.fixture(params=VARIANTS)
def backbone(request):
    backbone = random_backbone(**VARIANTS[request.param])
    for variable in backbone.variables:
        if variable.path.endswith("scale"):
            variable.assign(np.random.default_rng(1).normal(size=variable.shape) * 0.3)
    return backbone


def logits(backbone, token_ids, padding_mask):
    model = VaultGemmaCausalLM(backbone)
    return to_numpy(
        model({"token_ids": np.array(token_ids), "padding_mask": np.array(padding_mask)})
    )


def test_equals_the_reference(backbone):
    found = logits(backbone, [ROW], [[1] * len(ROW)])
    np.testing.assert_allclose(found[0], reference.logits(backbone, ROW), atol=2e-5)


def test_padding_on_either_side_changes_nothing(backbone):
    expected = reference.logits(backbone, ROW[:5])
    right = logits(backbone, [ROW[:5] + [9] * 3], [[1] * 5 + [0] * 3])
    left = logits(backbone, [[9] * 3 + ROW[:5]], [[0] * 3 + [1] * 5])
    np.testing.assert_allclose(right[0, :5], expected, atol=2e-5)
    np.testing.assert_allclose(left[0, 3:], expected, atol=2e-5)
    assert np.isfinite(right).all() and np.isfinite(left).all()


def test_segments_of_a_row_are_as_if_alone(backbone):
    found = logits(backbone, [[*ROW, 9]], [[1] * 5 + [2] + [3] * 5 + [0]])[0]
    for part in (slice(0, 5), slice(5, 6), slice(6, 11)):
        np.testing.assert_allclose(found[part], reference.logits(backbone, ROW[part]), atol=2e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("chunks", [[1] * 11, [4, 4, 3], [6, 5]])
def test_cached_walk_equals_the_uncached_one(backbone, chunks):
    token_ids = np.array([ROW], "int32")
    positions = segment_positions(np.ones_like(token_ids))
    expected = to_numpy(backbone.walk(keras.ops.convert_to_tensor(token_ids), positions))
    cache, start, found = backbone.empty_cache(1, 16), 0, []
    for length in chunks:
        part = slice(start, start + length)
        ids = keras.ops.convert_to_tensor(token_ids[:, part])
        hidden, cache = backbone.walk(ids, positions[:, part], cache=cache, start=start)
        found.append(to_numpy(hidden))
        start += length
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=2e-5)
    assert to_numpy(cache.positions).tolist() == [[*range(11), -1, -1, -1, -1, -1]]


def test_parameter_count_follows_the_architecture():
    backbone = random_backbone()
    assert backbone.count_params() == 128 * 48 + 2 * (4 * 48 * 64 + 3 * 48 * 96 + 2 * 48) + 48


def test_variables_have_names_to_address_them_by():
    paths = [v.path for v in random_backbone(num_layers=1).variables]
    assert paths == [
        "token_embedding/embeddings",
        "decoder_block_0/attention_norm/scale",
        *(
            f"decoder_block_0/attention/{name}/weight"
            for name in ("query", "key", "value", "attention_output")
        ),
        "decoder_block_0/mlp_norm/scale",
        *(f"decoder_block_0/{name}/weight" for name in ("gate", "up", "down")),
        "final_norm/scale",
    ]


def test_config_round_trip():
    backbone = random_backbone(**VARIANTS["grouped heads, caps, sliding"], dtype="bfloat16")
    config = backbone.get_config()
    again = VaultGemmaBackbone.from_config(config)
    assert again.get_config() == config
    assert {v.dtype for v in again.variables} == {"bfloat16"}
    assert config["layer_types"] == VARIANTS["grouped heads, caps, sliding"]["layer_types"]


def test_bfloat16_turns_by_float32_angles():
    """Position 257 is 256 in bfloat16: with angles cast down on the way, two neighbours would be rotated alike."""
    backbone = random_backbone(num_layers=1, dtype="bfloat16", max_sequence_length=300)
    seen = {}
    attention = backbone.transformer_layers[0].attention
    call = attention.call
    attention.call = lambda x, angles, **kwargs: (
        seen.update(angles=angles) or call(x, angles, **kwargs)
    )
    backbone.walk(keras.ops.ones((1, 258), "int32"), keras.ops.arange(258, dtype="int32")[None])
    cos = to_numpy(seen["angles"][0])
    assert cos.dtype == np.float32
    np.testing.assert_allclose(cos[0, 256:, 0, 0], np.cos([256.0, 257.0]), atol=1e-6)


class Stored:
    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def read(self, dtype):
        return self.array.astype(dtype)


def test_initial_values_take_the_place_of_random_ones(monkeypatch):
    source = random_backbone()
    values = {v.path: Stored(to_numpy(v) + 1) for v in source.variables}
    monkeypatch.setattr(
        keras.initializers.RandomNormal,
        "__call__",
        lambda *_, **__: pytest.fail("drew random values"),
    )
    backbone = random_backbone(initial_values=values)
    for variable in backbone.variables:
        np.testing.assert_array_equal(to_numpy(variable), values[variable.path].array)
    assert "initial_values" not in backbone.get_config()
    with pytest.raises(
        ValueError, match="values of the backbone's variables alone. Received: decoder_block_1/"
    ):
        random_backbone(num_layers=1, initial_values=values)
    values["final_norm/scale"] = Stored(np.ones(3))
    with pytest.raises(
        ValueError,
        match=r"The value of final_norm/scale must have the shape \(48,\). Received: \(3,\)",
    ):
        random_backbone(initial_values=values)
    del values["decoder_block_0/up/weight"]
    with pytest.raises(
        ValueError,
        match=r"decoder_block_0/up/weight must have the shape \(96, 48\). Received: None",
    ):
        random_backbone(initial_values=values)


def test_longer_input_warns_once():
    backbone = random_backbone(max_sequence_length=4)
    inputs = {"token_ids": np.ones((1, 5), "int32"), "padding_mask": np.ones((1, 5), "int32")}
    with pytest.warns(UserWarning, match="5 positions and the model was trained on 4"):
        backbone(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        backbone(inputs)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(head_dim=15), "`head_dim` must be even.*head_dim=15"),
        (dict(num_layers=2.5), "`num_layers` must be a positive integer. Received: num_layers=2.5"),
        (dict(attention_heads=4), "attention_heads"),
    ],
)
def test_arguments_that_are_wrong_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        random_backbone(**changes)


def test_enable_lora_trains_query_and_value_factors_alone():
    backbone = random_backbone(num_layers=2)
    backbone.enable_lora(4)
    assert sorted(v.path for v in backbone.trainable_variables) == sorted(
        f"decoder_block_{i}/attention/{name}/lora_kernel_{factor}"
        for i in range(2)
        for name in ("query", "value")
        for factor in "ab"
    )
    factors = backbone.transformer_layers[0].attention.query
    assert tuple(factors.lora_kernel_a.shape) == (RELEASE_LIKE["hidden_dim"], 4)
    assert tuple(factors.lora_kernel_b.shape) == (4, 64)


def test_is_a_functional_keras_hub_backbone():
    backbone = random_backbone()
    assert isinstance(backbone, keras_hub.models.Backbone)
    features = keras.Model(backbone.input, backbone.get_layer("decoder_block_1").output)
    inputs = {"token_ids": np.array([ROW]), "padding_mask": np.ones((1, len(ROW)), "int32")}
    assert to_numpy(features(inputs)).shape == (1, len(ROW), 48)
