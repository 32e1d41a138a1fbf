import keras_hub
import numpy as np
import pytest
import reference
from common import random_backbone

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.prefill import MIN_CACHE_SLOTS
from keras_vaultgemma.generation.prompt_lookup import PromptLookup, draft
from keras_vaultgemma.generation.state import Settings

ROWS = [[2, 17, 5, 99, 17, 5], [2, 4], [2, *range(30, 55), 30, 31]]


def greedy():
    return keras_hub.samplers.GreedySampler()


def test_equals_greedy_decoding():
    model = VaultGemmaCausalLM(random_backbone(num_layers=2, num_key_value_heads=2))
    expected = [reference.greedy(model.backbone, row, 30) for row in ROWS]
    assert PromptLookup(model, greedy()).generate(ROWS, [30] * 3).tokens == expected


def test_limits_stops_and_log_probs_equal_those_of_greedy_decoding(model):
    plain, lookup = Generator(model, greedy()), PromptLookup(model, greedy())
    full = plain.generate(ROWS, [40] * 3)
    for limits, stops in (([0, 1, 40], ()), ([40] * 3, (full.tokens[0][9], full.tokens[2][5]))):
        expected, found = plain.generate(ROWS, limits, stops), lookup.generate(ROWS, limits, stops)
        assert (found.tokens, found.finish_reasons) == (expected.tokens, expected.finish_reasons)
        for a, b in zip(found.log_probs, expected.log_probs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.first_backend
def test_accepted_drafts_take_fewer_passes(model, monkeypatch):
    """With the right draft each time, a forward pass gives eight tokens."""
    row, count = [2, 17, 5], 33
    tokens = Generator(model, greedy()).generate([row], [count]).tokens[0]
    text = row + tokens
    monkeypatch.setattr(
        "keras_vaultgemma.generation.prompt_lookup.draft",
        lambda ids, length: text[len(ids) : len(ids) + length],
    )
    parts = [new for (new,), _ in PromptLookup(model, greedy()).stream([row], [count])]
    assert [len(part) for part in parts] == [1, 8, 8, 8, 8]
    assert [token for part in parts for token in part] == tokens


def count_passes(lookup):
    """Return a list to which each forward pass appends its number of tokens."""
    verify, passes = lookup._verify, []
    lookup._verify = lambda ids, *others: passes.append(ids.shape[1]) or verify(ids, *others)
    return passes


@pytest.mark.first_backend
def test_a_text_that_repeats_itself_takes_fewer_passes(tiny):
    """With drafts from the text; greedy text of the bundled model repeats itself."""
    (row,) = tiny.preprocessor.tokenize_prompts(["Once upon a time"])
    expected = Generator(tiny, greedy()).generate([row], [120]).tokens
    lookup = PromptLookup(tiny, greedy())
    passes = count_passes(lookup)
    assert lookup.generate([row], [120]).tokens == expected
    assert 1 + len(passes) <= len(expected[0]) / 1.5


@pytest.mark.parametrize(
    "length, is_accepted, passes_expected",
    [
        (203, True, [8] * 6 + [1] * 4),
        *(
            pytest.param(length, is_accepted, passes, marks=pytest.mark.first_backend)
            for length, is_accepted, passes in (
                (200, True, [8] * 7),
                (250, True, [1] * 5),
                *((length, False, None) for length in (200, 203, 250)),
            )
        ),
    ],
)
def test_a_text_that_fills_the_cache(model, monkeypatch, length, is_accepted, passes_expected):
    """Drafts need capacity in the cache, and none is added for them."""
    row, count = (
        np.random.default_rng(0).integers(2, 128, length).tolist(),
        MIN_CACHE_SLOTS - length,
    )
    (tokens,) = Generator(model, greedy()).generate([row], [count]).tokens
    text = row + tokens if is_accepted else [127] * MIN_CACHE_SLOTS
    monkeypatch.setattr(
        "keras_vaultgemma.generation.prompt_lookup.draft",
        lambda ids, length: text[len(ids) : len(ids) + length],
    )
    lookup, caches = PromptLookup(model, greedy()), []
    passes, prefill = count_passes(lookup), lookup._generator.prefill
    lookup._generator.prefill = lambda *args: caches.append(prefill(*args)) or caches[-1]
    assert lookup.generate([row], [count]).tokens == [tokens]
    assert [cache.positions.shape for _, cache, _ in caches] == [(1, MIN_CACHE_SLOTS)]
    assert passes == passes_expected or not is_accepted


@pytest.mark.first_backend
def test_rejected_drafts_change_nothing(model, monkeypatch):
    expected = Generator(model, greedy()).generate(ROWS, [20] * 3).tokens
    monkeypatch.setattr(
        "keras_vaultgemma.generation.prompt_lookup.draft", lambda ids, length: [77, 78, 79][:length]
    )
    assert PromptLookup(model, greedy()).generate(ROWS, [20] * 3).tokens == expected


def test_draft():
    assert draft([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert draft([1, 2, 7, 1, 2, 8, 1, 2], 3) == [8, 1, 2]  # the latest of equal matches
    # A longer match comes before a later one.
    assert draft([1, 2, 7, 3, 2, 8, 1, 2], 1) == [7]
    assert draft([4, 1, 2, 7, 1, 2, 8, 4, 1, 2], 1) == [7]
    assert draft([3, 5, 4, 5], 7) == [4, 5]  # a match of one
    assert draft([5, 5], 4) == [5]
    assert draft([1, 2, 3], 4) == []
    assert draft([1], 4) == []
    assert draft([1, 1, 1], 0) == []


def test_other_samplers_and_settings_are_rejected(model):
    with pytest.raises(ValueError, match="needs `sampler` to be greedy. Received: TopKSampler"):
        PromptLookup(model, keras_hub.samplers.TopKSampler())
    with pytest.raises(ValueError, match="without `repetition_penalty`"):
        PromptLookup(model, greedy()).generate(ROWS, [2] * 3, settings=Settings(min_p=0.1))
