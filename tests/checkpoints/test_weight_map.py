"""The map of weights, compared with the backbone, with a file of Keras and with literal names."""

import math

import numpy as np
import pytest
from common import RELEASE_LIKE, random_backbone

from keras_vaultgemma.checkpoints.hdf5_format import open_hdf5
from keras_vaultgemma.checkpoints.weight_map import (
    GEMMA,
    HUGGING_FACE,
    KERAS,
    KERAS_HUB,
    Location,
    weight_map,
)

pytestmark = pytest.mark.any_backend

# No two widths alike, so that a shape of a wrong variable is noticed.
SIZES = dict(
    num_layers=2,
    num_query_heads=6,
    num_key_value_heads=2,
    hidden_dim=24,
    intermediate_dim=40,
    head_dim=10,
)
BLOCK = {
    "attention_norm/scale": ("input_layernorm", (24,), "pre_attention_norm", (24,)),
    "attention/query/weight": ("self_attn.q_proj", (60, 24), "attention/query_dense", (6, 24, 10)),
    "attention/key/weight": ("self_attn.k_proj", (20, 24), "attention/key_dense", (2, 24, 10)),
    "attention/value/weight": ("self_attn.v_proj", (20, 24), "attention/value_dense", (2, 24, 10)),
    "attention/attention_output/weight": (
        "self_attn.o_proj",
        (24, 60),
        "attention/output_dense",
        (6, 10, 24),
    ),
    "mlp_norm/scale": ("pre_feedforward_layernorm", (24,), "pre_ffw_norm", (24,)),
    "gate/weight": ("mlp.gate_proj", (40, 24), "gating_ffw", (24, 40)),
    "up/weight": ("mlp.up_proj", (40, 24), "gating_ffw_2", (24, 40)),
    "down/weight": ("mlp.down_proj", (24, 40), "ffw_linear", (40, 24)),
}


@pytest.fixture
def weights():
    return weight_map({**RELEASE_LIKE, **SIZES})


def test_paths_and_shapes_are_the_backbones(weights):
    expected = {
        variable.path: tuple(variable.shape)
        for variable in random_backbone(**{**RELEASE_LIKE, **SIZES}).variables
    }
    assert {weight.path: weight.shape for weight in weights} == expected
    assert sum(weight.size for weight in weights) == sum(map(math.prod, expected.values()))


def test_names_and_shapes_in_the_other_libraries(weights):
    locations = {weight.path: weight.locations for weight in weights}
    ends = ("token_embedding/embeddings", "final_norm/scale")
    hugging_face = ["model.embed_tokens.weight", "model.norm.weight"]
    keras_hub = ["layers/reversible_embedding/vars/0", "layers/rms_normalization/vars/0"]
    assert [locations[path][HUGGING_FACE].name for path in ends] == hugging_face
    assert [locations[path][KERAS_HUB].name for path in ends] == keras_hub
    for i, suffix in enumerate(("", "_1")):
        for path, (theirs, their_shape, hub, hub_shape) in BLOCK.items():
            location = locations[f"decoder_block_{i}/{path}"]
            assert location[HUGGING_FACE][:2] == (f"model.layers.{i}.{theirs}.weight", their_shape)
            assert location[KERAS_HUB][:2] == (
                f"layers/gemma_decoder_block{suffix}/{hub}/vars/0",
                hub_shape,
            )
    assert len(weights) == 2 + 2 * len(BLOCK)


def test_names_and_values_in_keras_own_file(weights, tmp_path):
    backbone = random_backbone(**{**RELEASE_LIKE, **SIZES})
    backbone.save_weights(tmp_path / "model.weights.h5")
    saved = open_hdf5(tmp_path / "model.weights.h5")
    assert saved.keys() == {weight.locations[KERAS].name for weight in weights}
    values = {variable.path: variable.numpy() for variable in backbone.variables}
    for weight in weights:
        location = weight.locations[KERAS]
        assert np.array_equal(
            location.to_variable(saved[location.name], weight.shape), values[weight.path]
        )


@pytest.mark.parametrize("name", [HUGGING_FACE, GEMMA, KERAS_HUB, KERAS])
def test_there_and_back(weights, name):
    for weight in weights:
        value = np.arange(weight.size).reshape(weight.shape)
        stored = weight.locations[name].from_variable(value)
        assert stored.shape == weight.locations[name].shape
        assert np.array_equal(weight.locations[name].to_variable(stored, weight.shape), value)


def test_heads_are_contiguous():
    """Literal: two heads of three channels over a width of two."""
    location = Location("", (2, 2, 3), (1, 0, 2))
    stored = np.array([[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]])
    value = location.to_variable(stored, (2, 6))
    assert value.tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert np.array_equal(location.from_variable(value), stored)
