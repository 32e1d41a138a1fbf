"""Statistics of next-token distributions, compared with those of all logits."""

import numpy as np
import pytest
from common import IDS

from keras_vaultgemma.evaluation.token_statistics import TokenStatistics


@pytest.mark.parametrize("top_k", [None, 7])
def test_statistics_are_those_of_the_logits(model, monkeypatch, top_k):
    monkeypatch.setattr("keras_vaultgemma.evaluation.token_statistics.MAX_CHUNK", 2)
    ids, mask = IDS["token_ids"], IDS["padding_mask"]
    targets = np.roll(ids, -1, axis=1)
    is_target = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]])
    found = TokenStatistics(model, top_k)(ids, mask, targets, is_target)
    logits = model.score(IDS, scoring_mode="logits").astype("float64")
    for b, t in np.argwhere(np.ones_like(ids)):
        p = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
        best = np.sort(p)[::-1][: top_k or len(p)]
        target = p[targets[b, t]]
        mean = (p * np.log(p)).sum()
        expected = {
            "loss": -np.log(target),
            "sampled_loss": -np.log(target / best.sum()) if target >= best[-1] else np.inf,
            "mean": mean,
            "std": np.sqrt((p * (np.log(p) - mean) ** 2).sum()),
        }
        for name, value in expected.items():
            assert found[name][b, t] == pytest.approx(
                value * is_target[b, t] if is_target[b, t] else 0, rel=1e-3, abs=1e-4
            )
