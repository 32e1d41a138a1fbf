import keras_hub
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.search import SearchGenerator, cut_after_stop
from keras_vaultgemma.generation.state import Settings

ROWS = [[2, 17, 5, 99], [2, 4], [2, *range(30, 55)], [9]]


@pytest.mark.first_backend
def test_contrastive_search_without_penalty_is_greedy(model):
    greedy = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS[:1], [6]).tokens
    contrastive = SearchGenerator(model, keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.0))
    assert contrastive.generate(ROWS[:1], [6]).tokens == greedy
    assert contrastive.generate(ROWS[:1], [6], [greedy[0][2]]).tokens == [
        cut_after_stop(greedy[0], [greedy[0][2]])
    ]


@pytest.mark.first_backend
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


def contrastive(model, **kwargs):
    return SearchGenerator(model, keras_hub.samplers.ContrastiveSampler(**kwargs))


@pytest.mark.first_backend
def test_rows_of_a_batch_get_what_they_get_alone(model):
    search, limits = contrastive(model, k=4, alpha=0.6), [6, 5, 0, 4]
    alone = [search.generate([row], [limit]) for row, limit in zip(ROWS, limits, strict=True)]
    assert search.generate(ROWS, limits).tokens == [found.tokens[0] for found in alone]
    assert [len(found.tokens[0]) for found in alone] == limits


@pytest.mark.first_backend
def test_stop_ids_and_a_function_end_rows(model):
    search = contrastive(model, k=4, alpha=0.6)
    full = search.generate(ROWS, [6] * 4).tokens
    stop = full[0][2]
    found = search.generate(ROWS, [6] * 4, [stop, 0])  # 0 is the padding
    assert found.tokens == [cut_after_stop(row, (stop, 0)) for row in full]
    assert found.finish_reasons == [
        "stop" if row[-1] in (stop, 0) else "length" for row in found.tokens
    ]
    assert contrastive(model, k=4).generate(ROWS, [0] * 4).tokens == [[]] * 4


@pytest.mark.first_backend
def test_a_function_is_asked_every_few_tokens(model, monkeypatch):
    monkeypatch.setattr("keras_vaultgemma.generation.search.STOP_CHECK_INTERVAL", 4)
    search, asked = contrastive(model, k=2), []
    full = search.generate(ROWS[1:2], [12]).tokens[0]
    found = search.generate(
        ROWS[1:2], [12], ends=lambda i, row: asked.append(len(row)) or len(row) > 6
    )
    assert asked == [4, 8] and found.tokens == [full[:8]]


def test_settings_are_rejected(model):
    with pytest.raises(ValueError, match="one token at a time. Received: Settings\\(seed=3"):
        contrastive(model).generate(ROWS, [2] * 4, settings=Settings(seed=3))


def test_cut_after_stop():
    assert cut_after_stop([5, 6, 7, 6], (6,)) == [5, 6]
    assert cut_after_stop([5, 6], (9,)) == [5, 6]
