"""A privacy audit: the trained weights must not reveal who took part beyond ε, and do so without clipping.

200 canaries are each in the training data or not, by a coin flip. After training, membership is guessed from how well
the model predicts each canary, and the number of correct guesses gives a lower bound of ε (Steinke et al., 2023,
https://arxiv.org/abs/2305.08846).
"""

import keras
import numpy as np
import pytest
from common import random_backbone
from keras import ops
from scipy import stats

from keras_vaultgemma import VaultGemmaCausalLM, privacy
from keras_vaultgemma.privacy import mechanism

# One backend is enough for every change: on each of them other tests compare the mechanism with a plain loop.
pytestmark = [pytest.mark.usefixtures("own_key")]
if keras.config.backend() != "jax":
    pytestmark.append(pytest.mark.long)

CANARIES, LENGTH, VOCABULARY = 200, 8, 64
EPSILON, DELTA, CLIP_NORM = 1.0, 1e-5, 0.01
CONFIDENCE = 0.95


def canaries():
    """Rows of random ids, which only a model that was trained on them predicts well."""
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (CANARIES, LENGTH + 1)).astype("int32")
    is_in = np.random.default_rng(2).permutation(CANARIES) < CANARIES // 2
    return ids, is_in


def scores(epochs=20, rate=5e-3):
    """Return each canary's gain of log-likelihood by training, and True for those that took part."""
    keras.utils.set_random_seed(0)
    sizes = dict(
        vocabulary_size=VOCABULARY, num_layers=1, hidden_dim=32, intermediate_dim=64, head_dim=16
    )
    model = VaultGemmaCausalLM(random_backbone(**sizes, num_query_heads=2, num_key_value_heads=2))
    ids, is_in = canaries()
    before = model.score(ids).sum(axis=1)
    model.compile(
        keras.optimizers.Adam(rate),
        privacy=privacy.DPSGD(epsilon=EPSILON, delta=DELTA, clip_norm=CLIP_NORM),
    )
    x = {"token_ids": ids[is_in, :-1], "padding_mask": np.ones((is_in.sum(), LENGTH), "int32")}
    model.fit(x, ids[is_in, 1:], batch_size=25, epochs=epochs, verbose=0)
    assert 0.95 * EPSILON < model.privacy.spent().epsilon <= EPSILON
    return before - model.score(ids).sum(axis=1), is_in


def lower_bound(gains, is_in):
    """Return a lower bound of ε with 95 % confidence: the best of several numbers of guesses, Bonferroni-corrected.

    Under ε-DP each guess is right with probability e^ε / (1 + e^ε) at most, whatever was guessed before. δ adds at
    most 2 * CANARIES * δ to the probability of a number of right guesses.
    """
    order, best = np.argsort(gains), 0.0
    numbers = (10, 25, 50, 100)
    for guesses in numbers:
        right = is_in[order[-guesses:]].sum() + (~is_in[order[:guesses]]).sum()
        chance = (1 - CONFIDENCE) / len(numbers) - 2 * CANARIES * DELTA
        # The smallest p for which this many right guesses are not too unlikely (Clopper and Pearson, 1934).
        p = stats.beta.ppf(chance, right, 2 * guesses - right + 1) if right else 0.0
        best = max(best, np.log(p / (1 - p)) if p > 0.5 else 0.0)
    return best


def oracle(gains, is_in):
    auditing = pytest.importorskip("jax_privacy.auditing")
    auditor = auditing.CanaryScoreAuditor(gains[is_in], gains[~is_in])
    return auditor.epsilon_one_run(significance=1 - CONFIDENCE, delta=DELTA)


def test_the_audit_finds_no_more_than_epsilon():
    gains, is_in = scores()
    assert lower_bound(gains, is_in) < EPSILON
    assert oracle(gains, is_in) < EPSILON


def test_the_audit_detects_missing_clipping(monkeypatch):
    """The noise and the claimed ε are the same, but no row's gradient is clipped."""

    def unclipped(gradients, losses, is_present, clip_norm):
        return ops.cast(is_present, "float32"), is_present, 0.0 * losses

    monkeypatch.setattr(mechanism, "clip_factors", unclipped)
    gains, is_in = scores()
    assert lower_bound(gains, is_in) > 2 * EPSILON
    assert oracle(gains, is_in) > 2 * EPSILON
