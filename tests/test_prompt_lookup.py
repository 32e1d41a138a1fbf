import keras_hub
import numpy as np
import pytest
import reference
from common import random_backbone

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.decode_state import Settings
from keras_vaultgemma.generation import Generator
from keras_vaultgemma.prompt_lookup import PromptLookup, draft

ROWS = [[2, 17, 5, 99, 17, 5], [2, 4], [2, *range(30, 55), 30, 31]]


def greedy():
    return keras_hub.samplers.GreedySampler()


def test_it_is_greedy_decoding():
    model = VaultGemmaCausalLM(random_backbone(num_layers=2, num_key_value_heads=2))
    expected = [reference.greedy(model.backbone, row, 30) for row in ROWS]
    assert PromptLookup(model, greedy()).generate(ROWS, [30] * 3).tokens == expected


def test_limits_stops_and_log_probs_are_those_of_greedy_decoding(model):
    plain, lookup = Generator(model, greedy()), PromptLookup(model, greedy())
    full = plain.generate(ROWS, [40] * 3)
    for limits, stops in (([0, 1, 40], ()), ([40] * 3, (full.tokens[0][9], full.tokens[2][5]))):
        expected, found = plain.generate(ROWS, limits, stops), lookup.generate(ROWS, limits, stops)
        assert (found.tokens, found.finish_reasons) == (expected.tokens, expected.finish_reasons)
        for a, b in zip(found.log_probs, expected.log_probs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_repeats_takes_fewer_passes(model, monkeypatch):
    """With the right guess each time, a pass gives eight tokens."""
    row, count = [2, 17, 5], 33
    tokens = Generator(model, greedy()).generate([row], [count]).tokens[0]
    text = row + tokens
    monkeypatch.setattr("keras_vaultgemma.prompt_lookup.draft", lambda ids, length: text[len(ids) : len(ids) + length])
    parts = [new for (new,), _ in PromptLookup(model, greedy()).stream([row], [count])]
    assert [len(part) for part in parts] == [1, 8, 8, 8, 8]
    assert [token for part in parts for token in part] == tokens


def test_wrong_guesses_change_nothing(model, monkeypatch):
    expected = Generator(model, greedy()).generate(ROWS, [20] * 3).tokens
    monkeypatch.setattr("keras_vaultgemma.prompt_lookup.draft", lambda ids, length: [77, 78, 79][:length])
    assert PromptLookup(model, greedy()).generate(ROWS, [20] * 3).tokens == expected


def test_draft():
    assert draft([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert draft([1, 2, 7, 1, 2, 8, 1, 2], 3) == [8, 1, 2]  # the latest of equal matches
    assert draft([3, 5, 4, 5], 7) == [4, 5]  # a match of one
    assert draft([5, 5], 4) == [5]
    assert draft([1, 2, 3], 4) == []
    assert draft([1], 4) == []
    assert draft([1, 1, 1], 0) == []


def test_other_samplers_and_settings_are_refused(model):
    with pytest.raises(ValueError, match="needs `sampler` to be greedy. Received: TopKSampler"):
        PromptLookup(model, keras_hub.samplers.TopKSampler())
    with pytest.raises(ValueError, match="without `repetition_penalty`"):
        PromptLookup(model, greedy()).generate(ROWS, [2] * 3, settings=Settings(min_p=0.1))
