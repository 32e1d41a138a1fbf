"""Rows that come and go get what `generate` gives each of them alone."""

import keras_hub
import numpy as np
import pytest
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, backend
from keras_vaultgemma.generation import continuous_batch, sampling
from keras_vaultgemma.generation.batch_loop import TOP
from keras_vaultgemma.generation.batch_rows import Row
from keras_vaultgemma.generation.continuous_batch import ContinuousBatch, ring_positions
from keras_vaultgemma.generation.prompt_scores import PromptScorer

GREEDY = keras_hub.samplers.GreedySampler()
PROMPTS = [[2, 17, 5, 99], [2], [2, *range(30, 45)], [9, 4], [2, 8, 8], [2, 60, 61, 62, 63]]


@pytest.fixture(scope="module")
def model():
    return VaultGemmaCausalLM(
        random_backbone(
            num_layers=1,
            layer_types=["sliding_attention"],
            sliding_window_size=20,
            num_key_value_heads=2,
            initializer_range=0.6,  # so that texts do not repeat one token
        )
    )


@pytest.fixture(scope="module")
def batch(model):
    """A batch of few slots, so that the ring goes round several times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous_batch, "MIN_SLOTS", 32)
        yield ContinuousBatch(model, max_rows=2)


def alone(model, row, sampler=GREEDY, **options):
    if model.sampler is not sampler:  # Compiling takes most of the time.
        model.compile(sampler=sampler)
    ids = model.generate(row.prompt, max_new_tokens=row.limit, stop_token_ids=None, **options)
    return ids[len(row.prompt) :]


def finish(batch, steps=3):
    while batch.rows:
        batch.step(steps)


def test_rows_join_and_leave(model, batch):
    rows = [
        Row(prompt, limit)
        for prompt, limit in zip(PROMPTS * 2, [9, 16, 12, 1, 16, 3] * 2, strict=True)
    ]
    waiting = list(rows)
    for number in range(100):
        count = min(batch.free, len(waiting), number % 3)
        batch.add([waiting.pop(0) for _ in range(count)])
        for step in batch.step(1 + number % 5):
            assert len(step.log_probs) == len(step.tokens)
        if not waiting and not batch.rows:
            break
    assert [row.tokens for row in rows] == [alone(model, row) for row in rows]


@pytest.mark.first_backend
def test_the_cache_grows_and_shrinks(model, batch, monkeypatch):
    monkeypatch.setattr(continuous_batch, "SHRINK_AFTER", 2)
    rows, sizes = [Row([2, 5], 30), Row([2, *range(30, 45)], 40)], set()
    for row in rows:
        batch.add([row])
        batch.step(2)
        sizes.add((len(batch._rows), batch._slots))
    while batch.rows:
        batch.step(4)
        sizes.add((len(batch._rows), batch._slots))
    assert sizes == {(1, 32), (2, 64), (1, 64)}
    assert [row.tokens for row in rows] == [alone(model, row) for row in rows]


@pytest.mark.first_backend
def test_stop_ids_limits_and_removal(model, batch):
    whole = [alone(model, Row(prompt, 12)) for prompt in PROMPTS[:3]]
    rows = [Row(prompt, 12) for prompt in PROMPTS[:3]]
    rows[0].stop_token_ids = (127, whole[0][4])
    batch.add(rows[:2])
    batch.step(2)
    batch.remove(rows[1])
    batch.add(rows[2:])
    finish(batch)
    batch.remove(rows[2])
    assert rows[0].tokens == whole[0][: whole[0].index(whole[0][4]) + 1] and rows[0].remaining == 0
    assert rows[1].tokens == whole[1][:2] and rows[2].tokens == whole[2]


@pytest.mark.first_backend
def test_options_are_each_rows_own(model, batch):
    """Greedy, sampled and penalised rows of one batch equal calls of `generate` with these options."""
    prompt, limit = PROMPTS[0], 12
    rows = [
        Row(prompt, limit),
        Row(prompt, limit, (), 1.5, 0.6, uniforms=sampling.uniforms([7], [prompt], limit)[0]),
        Row(prompt, limit, repetition_penalty=4.0),
        Row(prompt, limit, (), 1.0, min_p=0.2, uniforms=sampling.uniforms([8], [prompt], limit)[0]),
    ]
    for two in (rows[:2], rows[2:]):
        batch.add(two)
        finish(batch)
    top_p = keras_hub.samplers.TopPSampler(p=0.6, k=None, temperature=1.5)
    assert [row.tokens for row in rows] == [
        alone(model, rows[0]),
        alone(model, rows[1], top_p, seed=7),
        alone(model, rows[2], repetition_penalty=4.0),
        alone(model, rows[3], keras_hub.samplers.RandomSampler(), seed=8, min_p=0.2),
    ]
    assert len({tuple(row.tokens) for row in rows}) == 4


@pytest.mark.first_backend
def test_log_probabilities(model, batch):
    row = Row(PROMPTS[0], 5, top=True)
    batch.add([row, Row(PROMPTS[2], 5)])
    steps = [step for _ in range(5) for step in batch.step() if step.row is row]
    logits = model.score([row.prompt + row.tokens], scoring_mode="logits")[0][3:8]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = np.array([step.log_probs[0] for step in steps])
    np.testing.assert_allclose(found, expected[range(5), row.tokens], rtol=1e-4, atol=1e-5)
    for step, row_logits in zip(steps, expected, strict=True):
        ((ids, log_probs),) = step.top
        assert len(ids) == TOP and ids[0] == step.tokens[0]
        np.testing.assert_allclose(log_probs, np.sort(row_logits)[::-1][:TOP], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(log_probs, row_logits[ids], rtol=1e-4, atol=1e-5)


@pytest.mark.first_backend
def test_a_row_whose_logits_are_not_finite_ends(batch, monkeypatch):
    batch.add([Row([2, 5], 6)])
    table = batch.model.backbone.token_embedding.embeddings
    values = np.array(to_numpy(table))
    try:
        table.assign(np.full_like(values, np.nan))
        (step,) = batch.step()
    finally:
        table.assign(values)
    assert np.isnan(step.log_probs[0]) and not batch.rows


@pytest.mark.first_backend
def test_scores_of_a_prompt(model):
    prompt = [2, *np.random.default_rng(0).integers(4, 128, 62).tolist()]
    scorer = PromptScorer(
        model, lambda f, **options: backend.compile_function(f, model.variables, **options), 3
    )
    scores = scorer(prompt)
    np.testing.assert_allclose(scores.log_probs, -model.score([prompt])[0][:-1], atol=1e-4)
    logits = model.score([prompt], scoring_mode="logits")[0]
    assert [ids[0] for ids, _ in scores.top] == logits.argmax(axis=1)[:-1].tolist()
    assert scorer([2]) == ([], [])


def test_positions_in_a_ring():
    for slot in range(5):
        expected = [-1] * 5
        for age in range(1, 4):  # three tokens, of which the last is just before `slot`
            expected[(slot - age) % 5] = 3 - age
        assert ring_positions([3, 0], slot, 5).tolist() == [expected, [-1] * 5]
