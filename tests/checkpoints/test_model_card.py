"""The model card says what the metadata say, and no more."""

import json

import pytest
from common import RELEASE_LIKE

from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.metadata import model_card

pytestmark = pytest.mark.any_backend

HYPERPARAMETERS = {
    **RELEASE_LIKE,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
METADATA = {
    "parameter_count": 1_234_567,
    "dtype": "bfloat16",
    "keras_vaultgemma_version": "9.8.7",
    "source": {"name": "hf://org/name", "revision": "abc", "files": {}},
}


def test_a_card_of_the_release():
    release = json.loads((presets.bundled()["vaultgemma_1b"] / "metadata.json").read_text())
    stated = {key: release[key] for key in ("license", "privacy")}
    card = model_card("hf", {**METADATA, **stated}, HYPERPARAMETERS, True)
    for text in (
        "library_name: transformers\n",
        "Converted from `hf://org/name`, revision `abc` by keras_vaultgemma 9.8.7, stored in bfloat16.",
        "- parameters: 1,234,567\n",
        "- hidden_dim: 48\n",
        "- layer_types: 2 x full_attention, 1 x sliding_attention\n",
        "- ε: 2.0\n- δ: 1.1e-10\n- unit of protection: one sequence of 1024 consecutive tokens\n",
        "- mechanism: DP-SGD with truncated Poisson subsampling\n",
        "- what it covers: Google's pre-training only",
        "## Licence\n\nGemma Terms of Use (https://ai.google.dev/gemma/terms).\n",
        "AutoTokenizer.from_pretrained",
    ):
        assert text in card
    assert card.startswith("---\n") and card.endswith("\n")


@pytest.mark.parametrize(
    "stated, sentence",
    [
        ({}, "The source makes no statement about privacy."),
        ({"privacy": None}, "The source states that it was not trained with differential privacy."),
        ({"privacy": "a sentence"}, "a sentence"),
        ({"privacy": {"epsilon": 3.0, "colour": "red"}}, "- ε: 3.0\n- colour: red"),
    ],
)
def test_privacy_is_what_the_source_states(stated, sentence):
    card = model_card("keras", {**METADATA, **stated}, HYPERPARAMETERS, False)
    assert f"## Privacy\n\n{sentence}\n\n## Licence\n" in card


def test_a_card_of_a_source_that_states_nothing():
    metadata = {**METADATA, "source": {"name": "folder", "revision": None}, "description": 5}
    card = model_card("keras", metadata, HYPERPARAMETERS, False)
    assert "library_name: keras-hub\n" in card
    assert "Converted from `folder` by keras_vaultgemma" in card
    assert 'from_preset("path/to/this/folder", preprocessor=None)' in card
    assert "The source states no licence; its terms apply to this copy too." in card
