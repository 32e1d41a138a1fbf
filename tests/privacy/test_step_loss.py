"""The privacy loss of one step against dp-accounting's δ(ε), closed forms and rounding to a grid."""

import math
import sys

import numpy as np
import pytest
from scipy import special

from keras_vaultgemma.privacy import step_loss
from keras_vaultgemma.privacy.step_loss import Pair

pytestmark = pytest.mark.any_backend

SETTINGS = [
    (0.01, 1.0),
    (0.02, 0.3),
    (0.05, 1e-4),
    (0.3, 1e-5),
    (0.3, 0.5),
    (0.3, 1 - 1e-12),
    (0.8, 1e-4),
    (1.0, 1.0),
    (2.0, 0.01),
    (31.7, 0.01),
    (100.0, 1e-5),
]


def delta(distribution, epsilon):
    excess = -np.expm1(np.minimum(0, epsilon - distribution.losses))
    return float(distribution.probabilities @ excess) + distribution.infinite


def interval_of(pair, tail, count):
    low, high = pair.loss(np.array(pair.ends(tail)))
    return float(high - low) / count


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sigma, q", SETTINGS)
def test_delta_is_that_of_dp_accounting_at_the_points_of_the_grid(sigma, q, symmetric):
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

    pair = Pair(1.0, q, sigma, symmetric)
    both = step_loss.on_grid((pair,), 1e-20, interval_of(pair, 1e-20, 500))
    directions = (
        [AdjacencyType.REPLACE] * 2 if symmetric else [AdjacencyType.REMOVE, AdjacencyType.ADD]
    )
    for distribution, direction in zip(both, directions, strict=True):
        theirs = GaussianPrivacyLoss(sigma, sampling_prob=q, adjacency_type=direction)
        epsilons = distribution.losses[::9]
        # It is a difference of two probabilities, and so has an absolute error of about 1e-16.
        expected = theirs.get_delta_for_epsilon(epsilons)
        found = np.array([delta(distribution, epsilon) for epsilon in epsilons])
        assert np.abs(found - expected).max() < 1e-13
        # In between the curve is above the true one.
        between = epsilons[:-1] + 0.3 * distribution.interval
        found = np.array([delta(distribution, epsilon) for epsilon in between])
        assert (found >= theirs.get_delta_for_epsilon(between) - 1e-13).all()


@pytest.mark.parametrize("count", [300, 100_000])
@pytest.mark.parametrize("sigma, q", SETTINGS[3:])
def test_probabilities_add_up_and_moments_are_never_too_small(sigma, q, count):
    """E[e^(λ loss)] has a closed form for integers λ (Mironov et al., 2019, arXiv:1908.10530); rounding to the
    grid raises it. After a million steps an error of 1e-14 would be one of 1e-8 in δ."""
    pair = Pair(1.0, q, sigma, False)
    remove, add = step_loss.on_grid((pair,), 1e-290, interval_of(pair, 1e-290, count))
    for distribution in (remove, add):
        losses, probabilities = distribution.losses, distribution.probabilities
        assert probabilities.sum() + distribution.infinite == pytest.approx(1, abs=2e-15)
        kept = probabilities > 0
        assert probabilities[kept] @ np.exp(-losses[kept]) == pytest.approx(1, abs=2e-15)
    order = 2  # λ + 1
    k = np.arange(order + 1)
    terms = (
        special.binom(order, k)
        * (1 - q) ** (order - k)
        * q**k
        * np.exp(k * (k - 1) / (2 * sigma**2))
    )
    moment = remove.probabilities @ np.exp(np.minimum(remove.losses, 700))
    assert moment >= terms.sum() * (1 - 2e-14)
    if count > 300:
        assert moment <= terms.sum() * (1 + 1e-6)


def test_second_differences_of_delta_cancel():
    """Why the probabilities are integrals: as second differences of δ(ε) they would be off by 1e-10 each."""
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    interval = 1e-6
    distribution, _ = step_loss.on_grid((Pair(1.0, 0.01, 100.0, False),), 1e-20, interval)
    mechanism = GaussianPrivacyLoss(100.0, sampling_prob=0.01)
    steps = np.diff(mechanism.get_delta_for_epsilon(distribution.losses))
    theirs = (steps[1:] - math.exp(interval) * steps[:-1]) / math.expm1(interval)
    # Their error, summed, is far above a δ of 1e-12.
    error = np.abs(theirs - distribution.probabilities[1:-1]).sum()
    assert 1e-10 < error < 1e-6


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sigma, q", SETTINGS)
def test_points_are_the_inverse_of_the_loss(sigma, q, symmetric):
    pair = Pair(1.0, q, sigma, symmetric)
    x = np.linspace(*pair.ends(1e-20), 9)
    losses = pair.loss(x)
    # Where the loss is all but constant, it determines no point, but the point determines the loss.
    inside = np.isfinite(pair.points(losses))
    assert inside.any()
    assert pair.loss(pair.points(losses)[inside]) == pytest.approx(
        losses[inside], rel=1e-9, abs=1e-15
    )


def test_truncation_is_a_mixture():
    """The weights are those that dp-accounting documents: 20 rows, q = 0.3, at most 5 rows."""
    from scipy import stats

    whole, displaced = step_loss.pairs(20, 0.3, 5, 0.8)
    draws = np.random.default_rng(0).random((200_000, 20)) < 0.3
    others, total = draws[:, 1:].sum(1), draws.sum(1)
    assert displaced.weight == pytest.approx((others >= 5).mean(), abs=5e-3)
    # A record is in a truncated batch of the whole data set with probability 5 / 20.
    expected = stats.binom.sf(5, 20, 0.3) * 5 / 20 / stats.binom.sf(4, 19, 0.3)
    assert displaced.probability == pytest.approx(expected)
    assert (total > 5).mean() * 0.25 / (others >= 5).mean() == pytest.approx(expected, rel=2e-2)
    assert whole == Pair(1 - displaced.weight, 0.3, 0.8, False)
    assert displaced[2:] == (0.4, True)
    assert step_loss.pairs(20, 0.3, 20, 0.8) == step_loss.pairs(20, 0.3, None, 0.8)
    assert len(step_loss.pairs(10**9, 1e-3, 10**9 - 1, 1.0)) == 1


def test_truncation_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert len(step_loss.pairs(100, 0.1, None, 1.0)) == 1
    with pytest.raises(ImportError, match=r"pip install 'keras-vaultgemma\[privacy\]'"):
        step_loss.pairs(100, 0.1, 12, 1.0)
