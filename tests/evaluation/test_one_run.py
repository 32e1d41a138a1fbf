"""The arithmetic of the one-run audit, compared with jax-privacy's, and the area under the curve."""

import numpy as np
import pytest
from scipy import stats

from keras_vaultgemma.evaluation.one_run import epsilon_lower_bound, lower_bound, p_value
from keras_vaultgemma.evaluation.roc import auc, true_positives

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-3])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_bounds_are_those_of_jax_privacy(delta, shift):
    """Its auditor guesses only that canaries above a threshold were in, which is a case of ours."""
    auditing = pytest.importorskip("jax_privacy.auditing")
    generator = np.random.default_rng(0)
    of_in, of_out = generator.normal(shift, size=100), generator.normal(size=100)
    threshold = float(np.median(of_in))
    auditor = auditing.CanaryScoreAuditor(of_in, of_out)
    expected = auditor.epsilon_one_run(
        significance=0.05, delta=delta, threshold_strategy=auditing.Explicit(threshold)
    )
    correct = int((of_in >= threshold).sum())
    guesses = correct + int((of_out >= threshold).sum())
    found = epsilon_lower_bound(200, guesses, correct, delta, 0.05)
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_mechanism_is_below_its_epsilon_and_close_to_it():
    """Randomised response reveals each coin with exactly ε, so that the bound is nearly tight."""
    generator, epsilon, exceeded, found = np.random.default_rng(0), 1.0, 0, []
    for _ in range(20):
        is_in = generator.integers(0, 2, 1000) == 1
        told = is_in ^ (generator.random(1000) > 1 / (1 + np.exp(-epsilon)))
        bound, guesses, correct = lower_bound(told + generator.random(1000) / 2, is_in, 1e-9)
        found.append(bound)
        exceeded += bound > epsilon
        assert 0 < correct <= guesses <= 1000
    assert exceeded <= 3  # at most 1 is expected
    assert np.mean(found) > 0.65


def test_p_values():
    assert p_value(200, 50, 40, 0.0, 0.0) == pytest.approx(
        stats.binomtest(40, 50, alternative="greater").pvalue
    )
    assert p_value(200, 50, 40, 1.0, 1e-3) > p_value(200, 50, 40, 1.0, 0.0)
    assert epsilon_lower_bound(200, 50, 25, 0.0, 0.05) == 0
    assert np.isfinite(epsilon_lower_bound(200, 200, 200, 1e-5, 0.05))
    assert p_value(200, 50, 0, 1.0, 1e-5) == 1


def test_few_canaries_reveal_little():
    for count, largest in ((2, 0.0), (7, 0.2)):
        bound, guesses, correct = lower_bound(np.arange(count), np.arange(count) > count / 2, 1e-5)
        assert 0 <= bound <= largest and correct <= guesses <= count


def test_areas_and_true_positives_count_all_pairs():
    generator = np.random.default_rng(0)
    members, controls = generator.integers(0, 9, 30), generator.integers(0, 7, 40)
    pairs = [(m > c) + (m == c) / 2 for m in members for c in controls]
    assert auc(members, controls) == pytest.approx(np.mean(pairs))
    for rate in (0.0, 0.05, 0.5, 1.0):
        found = [
            (members > threshold).sum()
            for threshold in range(-1, 10)
            if (controls > threshold).sum() <= rate * 40
        ]
        assert true_positives(members, controls, rate) <= max(found)
    assert true_positives(np.array([2, 3, 5]), np.array([1, 2, 2, 4]), 0.25) == 2
    assert true_positives(np.array([2, 3, 5]), np.array([1, 2, 2, 4]), 0.0) == 1
