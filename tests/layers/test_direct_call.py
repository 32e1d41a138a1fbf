import keras
import numpy as np
import pytest
from common import random_backbone, to_numpy

from keras_vaultgemma import lora
from keras_vaultgemma.layers.attention import segment_positions
from keras_vaultgemma.layers.direct_call import call_layer
from keras_vaultgemma.lora.injection import adaptable_layers

TOKEN_IDS = np.array([[2, 17, 5, 99, 31]], "int32")
MODES = [
    ("float32", None),
    ("bfloat16", None),
    ("mixed_bfloat16", None),
    ("float32", "int8"),
    ("bfloat16", "int8"),
    ("mixed_bfloat16", "int8"),
    ("float32", "int4"),
    ("mixed_bfloat16", "int4"),
]


def as_floats(x):
    return to_numpy(keras.ops.cast(x, "float32"))


def quantized_backbone(dtype, mode, **changes):
    backbone = random_backbone(num_layers=2, dtype=dtype, **changes)
    if mode:
        for layer in adaptable_layers(backbone).values():
            layer.quantize(mode)
    return backbone


@pytest.mark.parametrize("dtype, mode", MODES)
def test_equals_the_call_by_keras(dtype, mode):
    backbone = quantized_backbone(dtype, mode)
    block = backbone.transformer_layers[0]
    x = backbone.embedding_scale(backbone.token_embedding(TOKEN_IDS)) + 0.1
    layers = [block.attention_norm, block.mlp_norm, block.attention.query, block.gate, block.up]
    for layer in layers:
        found, expected = call_layer(layer, x), layer(x)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(as_floats(found), as_floats(expected))
    found, expected = (
        call_layer(backbone.token_embedding, TOKEN_IDS),
        backbone.token_embedding(TOKEN_IDS),
    )
    np.testing.assert_array_equal(as_floats(found), as_floats(expected))


@pytest.mark.parametrize("dtype, mode", MODES)
def test_a_walk_with_a_cache_equals_the_one_that_keras_calls(dtype, mode):
    """The latter is the functional model, whose outer layers are called by `Layer.__call__`."""
    backbone = quantized_backbone(dtype, mode)
    mask = np.ones_like(TOKEN_IDS)
    expected = as_floats(backbone({"token_ids": TOKEN_IDS, "padding_mask": mask}))
    found, _ = backbone.walk(
        keras.ops.convert_to_tensor(TOKEN_IDS),
        segment_positions(mask),
        cache=backbone.empty_cache(1, 5),
        start=0,
    )
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(as_floats(found), expected, atol=tolerance * np.abs(expected).max())


def test_inner_layers_are_not_called_by_keras(monkeypatch):
    backbone, called, call = random_backbone(num_layers=2), [], keras.layers.Layer.__call__
    ids, positions = map(
        keras.ops.convert_to_tensor, (TOKEN_IDS, np.arange(5, dtype="int32")[None])
    )

    def counted(layer, *args, **kwargs):
        called.append(layer.name)
        return call(layer, *args, **kwargs)

    monkeypatch.setattr(keras.layers.Layer, "__call__", counted)
    backbone.walk(ids, positions, cache=backbone.empty_cache(1, 5), start=0)
    assert called == []
    backbone({"token_ids": TOKEN_IDS, "padding_mask": np.ones_like(TOKEN_IDS)})
    assert [name for name in called if "decoder" in name] == ["decoder_block_0", "decoder_block_1"]
    assert not {"attention", "query", "attention_norm", "gate"} & set(called)


def test_an_input_of_another_dtype_is_cast():
    layer = random_backbone(num_layers=1, dtype="bfloat16").transformer_layers[0].gate
    x = keras.ops.ones((1, 2, 48), "float32")
    assert keras.backend.standardize_dtype(call_layer(layer, x).dtype) == "bfloat16"


def test_a_layer_that_is_not_built_is_built():
    layer, x = keras.layers.Dense(3), keras.ops.ones((1, 2))
    found = call_layer(layer, x)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(layer(x)))


def test_dropout_of_adapters_acts_in_training_alone():
    backbone = random_backbone(num_layers=1)
    lora.add(backbone, rank=2, dropout=0.5)
    for layer in (getattr(backbone.transformer_layers[0].attention, n) for n in ("query", "value")):
        layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    inputs = {"token_ids": TOKEN_IDS, "padding_mask": np.ones_like(TOKEN_IDS)}
    first, second = (as_floats(backbone(inputs, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(as_floats(backbone(inputs)), as_floats(backbone(inputs)))
    assert not np.array_equal(first, as_floats(backbone(inputs)))
