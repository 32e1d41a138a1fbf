"""Configs of layers, copies made from them, and stored initial values."""

import keras
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma.layers.attention import VaultGemmaAttention, causal_mask
from keras_vaultgemma.layers.decoder_block import VaultGemmaDecoderBlock
from keras_vaultgemma.layers.initializers import StoredValues
from keras_vaultgemma.layers.projection import Projection
from keras_vaultgemma.layers.reversible_embedding import ReversibleEmbedding
from keras_vaultgemma.layers.rms_norm import RMSNorm
from keras_vaultgemma.layers.rotary import RotaryAngles

HEADS = dict(num_query_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
LAYERS = {
    "projection": (Projection, dict(units=6, initializer_range=0.3)),
    "norm": (RMSNorm, dict(epsilon=1e-3)),
    "angles": (RotaryAngles, dict(head_dim=8, theta=500.0)),
    "embedding": (ReversibleEmbedding, dict(input_dim=9, output_dim=6, logit_soft_cap=3.0)),
    "attention": (
        VaultGemmaAttention,
        dict(**HEADS, query_pre_attn_scalar=9.0, logit_soft_cap=2.0),
    ),
    "block": (
        VaultGemmaDecoderBlock,
        dict(
            **HEADS,
            intermediate_dim=10,
            query_pre_attn_scalar=9.0,
            attention_logit_soft_cap=2.0,
            layer_norm_epsilon=1e-3,
        ),
    ),
}


class Stored:
    """A stored value of one number."""

    def __init__(self, value, shape):
        self.value, self.shape = value, shape

    def read(self, dtype):
        return np.full(self.shape, self.value, dtype)


def small_model():
    """A functional model of every layer."""
    token_ids = keras.Input((5,), dtype="int32")
    positions = keras.ops.cumsum(keras.ops.ones_like(token_ids), axis=1) - 1
    options = dict(
        angles=RotaryAngles(8, 500.0)(positions), attention_mask=causal_mask(positions, positions)
    )
    embedding = ReversibleEmbedding(9, 6)
    x = VaultGemmaDecoderBlock(**HEADS, intermediate_dim=10)(embedding(token_ids), **options)
    x = VaultGemmaAttention(**HEADS)(x, **options)
    return keras.Model(token_ids, Projection(9)(RMSNorm()(x)))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_config_round_trip(name, dtype):
    kind, arguments = LAYERS[name]
    layer = kind(**arguments, dtype=dtype, name="a")
    config = layer.get_config()
    assert arguments.items() <= config.items()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is kind and again.get_config() == config
    assert keras.saving.get_registered_name(kind) == f"keras_vaultgemma>{kind.__name__}"


@pytest.mark.parametrize(
    "name, paths",
    [
        ("projection", {"weight": (6, 6)}),
        ("norm", {"scale": (6,)}),
        ("embedding", {"embeddings": (9, 6)}),
    ],
)
def test_stored_values_replace_random_ones_and_are_not_in_the_config(name, paths):
    kind, arguments = LAYERS[name]
    values = {f"a/{path}": Stored(7.0, shape) for path, shape in paths.items()}
    layer = kind(**arguments, stored_values=StoredValues(values).sublayer("a"))
    layer.build((None, 6))
    assert not values and (to_numpy(layer.weights[0]) == 7).all()
    again = kind.from_config(layer.get_config())
    again.build((None, 6))
    assert not (to_numpy(again.weights[0]) == 7).any()


def test_a_stored_value_of_another_shape_is_rejected():
    layer = RMSNorm(stored_values=StoredValues({"scale": Stored(1.0, (3,))}))
    with pytest.raises(ValueError, match=r"value of scale must have the shape \(6,\).*\(3,\)"):
        layer.build((None, 6))


def test_a_quantized_projection_round_trip():
    layer = Projection(6)
    layer.build((None, 4))
    layer.quantize("int8")
    again = Projection.from_config(layer.get_config())
    again.build((None, 4))
    again.set_weights(layer.get_weights())
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(layer(x)))


def test_a_functional_model_can_be_cloned():
    model, token_ids = small_model(), np.array([[3, 1, 4, 1, 5]])
    clone = keras.models.clone_model(model)
    assert not np.allclose(to_numpy(clone(token_ids)), to_numpy(model(token_ids)))
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(to_numpy(clone(token_ids)), to_numpy(model(token_ids)))
