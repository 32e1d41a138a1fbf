import itertools

import keras
import keras_hub
import numpy as np
import pytest
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.generation.beam_search import BeamSearch
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.state import Settings

ROWS = [[2, 17, 5, 30], [2, 4], [2, *range(5, 30)], [9]]
VOCABULARY = 32


def beams(num_beams, **kwargs):
    return keras_hub.samplers.BeamSampler(num_beams=num_beams, **kwargs)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' model, this package's model) of one random checkpoint."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.VaultGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=128,
        layer_types=["full_attention"],
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        initializer_range=0.15,
    )
    theirs = transformers.VaultGemmaForCausalLM(config).eval()
    theirs.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    return theirs, VaultGemmaCausalLM.from_preset(folder, preprocessor=None)


def their_search(theirs, row, count, stops, **options):
    """New ids and score of transformers' beam search, for one prompt."""
    import torch

    found = theirs.generate(
        torch.tensor([row]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    ids = found.sequences[0, len(row) :].tolist()
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    scores = getattr(found, "sequences_scores", [np.nan])  # one beam is greedy and has none
    return ids[: end + 1], float(scores[0])


CASES = [
    (4, (3, 7, 12, 20, 25), 1.0),
    (3, (), None),
    (3, (7,), None),
    (2, (3, 7, 12, 20, 25), 0.0),
    (3, (3, 12), 2.5),
    (2, (3, 12, 20), -1.0),
    (5, (1,), None),
    (1, (3, 7, 12), None),
]


@pytest.mark.parametrize(
    "num_beams, stops, length_penalty",
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.first_backend) for case in CASES[1:])],
)
def test_equal_to_transformers_in_a_batch_and_alone(pair, num_beams, stops, length_penalty):
    theirs, ours = pair
    ours.compile(sampler=beams(num_beams))
    penalty = {} if length_penalty is None else dict(length_penalty=length_penalty)
    expected = [their_search(theirs, row, 9, stops, num_beams=num_beams, **penalty) for row in ROWS]
    options = dict(
        max_new_tokens=9,
        stop_token_ids=stops,
        strip_prompt=True,
        return_log_probs=True,
        return_finish_reason=True,
        **penalty,
    )
    together = ours.generate(ROWS, **options)
    assert together.output == [ids for ids, _ in expected]
    alone = [ours.generate(row, **options) for row in ROWS]
    assert [found.output for found in alone] == together.output
    assert together.finish_reason == [found.finish_reason for found in alone]
    assert together.finish_reason == [
        "stop" if ids[-1] in stops else "length" for ids in together.output
    ]
    for (ids, score), log_probs, single in zip(expected, together.log_probs, alone, strict=True):
        np.testing.assert_allclose(log_probs, single.log_probs, atol=1e-5)
        if num_beams > 1:
            exponent = 1.0 if length_penalty is None else length_penalty
            assert sum(log_probs) / len(ids) ** exponent == pytest.approx(score, abs=1e-4)


@pytest.mark.first_backend
def test_rows_of_a_batch_have_their_own_limits(pair):
    model = pair[1]
    model.compile(sampler=beams(3))
    options = dict(max_length=30, stop_token_ids=[7], strip_prompt=True)
    assert model.generate(ROWS, **options) == [model.generate(row, **options) for row in ROWS]
    search = BeamSearch(model, beams(3))
    limits = [0, 5, 1, 3]
    found = search.generate(ROWS, limits)
    assert [len(tokens) for tokens in found.tokens] == limits
    for row, limit, tokens in zip(ROWS, limits, found.tokens, strict=True):
        assert search.generate([row], [limit]).tokens == [tokens]
    assert search.generate(ROWS, [0] * 4) == ([[]] * 4, [[]] * 4, ["length"] * 4)


SMALL = 4
"""Vocabulary in which all texts can be enumerated."""


@pytest.fixture(scope="module")
def small():
    keras.utils.set_random_seed(3)
    return VaultGemmaCausalLM(random_backbone(num_layers=1, vocabulary_size=SMALL))


def enumerated(model, row, limit, ends, length_penalty, temperature=1.0):
    """The best of all continuations of a row, each ended at once or at the limit."""
    texts = list(itertools.product(range(SMALL), repeat=limit))
    rows = np.array([[*row, *text] for text in texts])
    x = {"token_ids": rows, "padding_mask": np.ones_like(rows)}
    logits = to_numpy(model(x))[:, len(row) - 1 : -1] / temperature
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scores = {}
    for text, table in zip(texts, log_p, strict=True):
        prefixes = (list(text[: n + 1]) for n in range(limit))
        end = next((n + 1 for n, prefix in enumerate(prefixes) if ends(prefix)), limit)
        total = sum(table[n, token] for n, token in enumerate(text[:end]))
        scores[text[:end]] = total / end**length_penalty
    return list(max(scores, key=scores.get))


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "length_penalty, temperature",
    [
        (None, 1.0),
        (0.0, 1.0),
        (3.0, 4.0),
    ],
)
def test_as_many_beams_as_texts_find_the_best_of_all_texts(small, length_penalty, temperature):
    small.compile(sampler=beams(SMALL**3, temperature=temperature))
    exponent = 1.0 if length_penalty is None else length_penalty
    rows, options = [[2, 1, 3], [0]], dict(max_new_tokens=3, strip_prompt=True)
    for stops in ((), (1,), (0, 3)):
        expected = [
            enumerated(small, row, 3, lambda ids: ids[-1] in stops, exponent, temperature)  # noqa: B023
            for row in rows
        ]
        options |= dict(stop_token_ids=stops, length_penalty=length_penalty)
        assert small.generate(rows, **options) == expected
        assert [small.generate(row, **options) for row in rows] == expected


@pytest.mark.first_backend
def test_a_better_text_that_ends_early_wins(small):
    """A search that goes on after stop ids would lose it."""
    small.compile(sampler=beams(3))
    found = []
    for row, stop in itertools.product([[2], [1, 3], [0, 0, 1]], range(SMALL)):
        options = dict(max_new_tokens=6, stop_token_ids=[stop], strip_prompt=True)
        result = small.generate(row, length_penalty=0.0, return_log_probs=True, **options)
        full = small.generate(
            row, max_new_tokens=6, stop_token_ids=None, strip_prompt=True, return_log_probs=True
        )
        assert stop not in result.output[:-1]
        found.append(result.output[-1] == stop and sum(result.log_probs) > sum(full.log_probs))
    assert any(found)


@pytest.mark.first_backend
def test_a_function_of_the_text_ends_hypotheses(small):
    """As stop strings do: any two tokens may end a text."""
    search = BeamSearch(small, beams(SMALL**3))
    for pair in ([1, 1], [3, 0], [2, 2]):
        ends = lambda ids: ids[-2:] == pair  # noqa: B023, E731
        expected = enumerated(small, [2, 1, 3], 3, ends, 1.0)
        assert search.generate([[2, 1, 3]], [3], ends=lambda i, ids: ends(ids)).tokens == [expected]  # noqa: B023


@pytest.mark.first_backend
def test_one_beam_is_greedy_with_every_setting(pair):
    model = pair[1]
    greedy = Generator(model, keras_hub.samplers.GreedySampler())
    search = BeamSearch(model, beams(1))
    forbidden = {row[0]: -np.inf for row in greedy.generate(ROWS, [3] * 4).tokens}
    for settings in (
        Settings(),
        Settings(repetition_penalty=1.7, logit_bias={5: 2.0}),
        Settings(logit_bias=forbidden, min_p=0.2),
        Settings(logit_bias={5: 1e30}),
    ):
        expected = greedy.generate(ROWS, [6, 5, 4, 3], [7], settings)
        found = search.generate(ROWS, [6, 5, 4, 3], [7], settings)
        assert found.tokens == expected.tokens and found.finish_reasons == expected.finish_reasons
        for a, b in zip(found.log_probs, expected.log_probs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.first_backend
def test_min_p_excludes_unlikely_tokens_from_all_beams(pair):
    """With 1, only the most likely token of each text is left."""
    model = pair[1]
    expected = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS, [5] * 4).tokens
    found = BeamSearch(model, beams(3)).generate(ROWS, [5] * 4, settings=Settings(min_p=1.0))
    assert found.tokens == expected


@pytest.mark.first_backend
def test_eager_equals_compiled(pair):
    model = pair[1]
    eager = BeamSearch(model, beams(3), run_eagerly=True)
    assert (
        eager.generate(ROWS, [20] * 4, [7]).tokens
        == BeamSearch(model, beams(3)).generate(ROWS, [20] * 4, [7]).tokens
    )


@pytest.fixture
def searching(tiny):
    tiny.compile(sampler=beams(3))
    yield tiny
    tiny.compile(sampler="greedy")


@pytest.mark.first_backend
def test_stop_strings_end_a_search(searching):
    prompts = ["Once upon a time", "The fox said to the crow", "In the garden"]
    options = dict(
        max_new_tokens=9, strip_prompt=True, return_finish_reason=True, return_log_probs=True
    )
    full = searching.generate(prompts, **options)
    stops = [full.output[0][5:12], full.output[1][3:6]]
    found = searching.generate(prompts, stop=stops, **options)
    assert "stop" in found.finish_reason
    rows = searching.preprocessor.tokenize_prompts(prompts)
    ids = searching.generate(rows, stop=stops, **options)
    for i, prompt in enumerate(prompts):
        assert not any(stop in found.output[i] for stop in stops)
        alone = searching.generate(prompt, stop=stops, **options)
        assert alone.output == found.output[i] and alone.finish_reason == found.finish_reason[i]
        stream = searching.stream(prompt, max_new_tokens=9, stop=stops)
        assert "".join(stream) == found.output[i] and stream.finish_reason == found.finish_reason[i]
        assert stream.ids == ids.output[i] and len(ids.output[i]) == len(found.log_probs[i])
        text = searching.preprocessor.detokenize([ids.output[i]])[0]
        before = searching.preprocessor.detokenize([ids.output[i][:-1]])[0]
        is_stopped = found.finish_reason[i] == "stop"
        assert is_stopped == any(stop in text for stop in stops)
        assert not any(stop in before for stop in stops)


@pytest.mark.first_backend
def test_prompt_lookup_and_a_penalty_need_their_sampler(searching):
    with pytest.raises(ValueError, match="`prompt_lookup` needs `sampler` to be greedy"):
        searching.generate("Once", max_new_tokens=2, prompt_lookup=True)
    searching.compile(sampler="top_k")
    with pytest.raises(ValueError, match="`length_penalty` needs .*BeamSampler.*with TopKSampler"):
        searching.generate("Once", max_new_tokens=2, length_penalty=0.5)
