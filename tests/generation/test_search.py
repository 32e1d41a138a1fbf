import keras
import keras_hub
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.search import SearchGenerator, cut_after_stop
from keras_vaultgemma.generation.state import Settings

ROWS = [[2, 17, 5, 99], [2, 4], [2, *range(30, 55)], [9]]


def test_beam_search_finds_what_a_full_search_finds(model):
    """With as many beams as the vocabulary has pieces, two steps of beam search are exhaustive."""
    row = [2, 17, 5]
    size = model.backbone.vocabulary_size

    def log_probs(rows):
        x = {"token_ids": np.array(rows), "padding_mask": np.ones_like(rows)}
        return to_numpy(keras.ops.log_softmax(model(x), axis=-1))[:, -1]

    first = log_probs([row])[0]
    second = log_probs([[*row, i] for i in range(size)])
    best = np.unravel_index(np.argmax(first[:, None] + second), (size, size))
    found = (
        SearchGenerator(model, keras_hub.samplers.BeamSampler(num_beams=size))
        .generate([row], [2])
        .tokens
    )
    assert found == [[int(i) for i in best]]


@pytest.mark.first_backend
def test_one_beam_is_greedy_for_rows_of_different_lengths(model):
    greedy = (
        Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS, [6, 5, 4, 3]).tokens
    )
    assert (
        SearchGenerator(model, keras_hub.samplers.BeamSampler(num_beams=1))
        .generate(ROWS, [6, 5, 4, 3])
        .tokens
        == greedy
    )


def test_contrastive_search_without_penalty_is_greedy(model):
    greedy = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS[:1], [6]).tokens
    contrastive = SearchGenerator(model, keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.0))
    assert contrastive.generate(ROWS[:1], [6]).tokens == greedy
    assert contrastive.generate(ROWS[:1], [6], [greedy[0][2]]).tokens == [
        cut_after_stop(greedy[0], [greedy[0][2]])
    ]


def test_contrastive_search_equals_the_written_out_one(model):
    """Su et al., 2022, arXiv:2202.06417: the likely token that is least like any before it."""
    k, alpha, row = 4, 0.6, list(ROWS[0])

    def hidden(row):
        mask = np.arange(16)[None] < len(row)  # one length, because each is compiled
        x = {"token_ids": np.resize(row, (1, 16)) * mask, "padding_mask": mask.astype("int32")}
        states = model.backbone(x)
        logits = to_numpy(model.logits(states))[0, len(row) - 1]
        states = to_numpy(states)[0, : len(row)]
        return states / np.linalg.norm(states, axis=-1, keepdims=True), logits

    for _ in range(8):
        logits = hidden(row)[1].astype("float64")
        p = np.exp(logits - logits.max())
        p /= p.sum()
        candidates = np.argsort(-p)[:k].tolist()
        states = [hidden([*row, token])[0] for token in candidates]
        scores = [
            (1 - alpha) * p[token] - alpha * (s[:-1] @ s[-1]).max()
            for token, s in zip(candidates, states, strict=True)
        ]
        row.append(candidates[int(np.argmax(scores))])
    contrastive = SearchGenerator(model, keras_hub.samplers.ContrastiveSampler(k=k, alpha=alpha))
    found = contrastive.generate(ROWS[:1], [8]).tokens[0]
    assert found == row[len(ROWS[0]) :]
    assert (
        found
        != Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS[:1], [8]).tokens[0]
    )


def test_speculative_sampler_is_rejected(model):
    with pytest.raises(ValueError, match="needs no draft model"):
        SearchGenerator(model, keras_hub.samplers.SpeculativeSampler())


def test_settings_are_rejected(model):
    with pytest.raises(ValueError, match="one token at a time. Received: Settings\\(seed=3"):
        SearchGenerator(model, keras_hub.samplers.BeamSampler()).generate(
            ROWS, [2] * 4, settings=Settings(seed=3)
        )


@pytest.mark.first_backend
def test_finish_reasons_and_no_tokens(model):
    search = SearchGenerator(model, keras_hub.samplers.BeamSampler(num_beams=1))
    tokens = search.generate(ROWS[:1], [3]).tokens
    assert search.generate(ROWS[:1], [3]).finish_reasons == ["length"]
    assert search.generate(ROWS[:1], [3], [tokens[0][1]]).finish_reasons == ["stop"]
    assert search.generate(ROWS, [0] * 4).tokens == [[]] * 4


def test_cut_after_stop():
    assert cut_after_stop([5, 6, 7, 6], (6,)) == [5, 6]
    assert cut_after_stop([5, 6], (9,)) == [5, 6]
