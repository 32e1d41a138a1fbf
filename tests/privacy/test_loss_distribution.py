"""Composition of privacy losses against closed forms and against plain convolution."""

import math

import numpy as np
import pytest

from keras_vaultgemma.privacy import loss_distribution, step_loss
from keras_vaultgemma.privacy.loss_distribution import ROUND_OFF, LossDistribution

pytestmark = pytest.mark.any_backend


def randomized_response(interval):
    """Losses of ± h: the answer is true with probability e^h / (1 + e^h). T steps have a binomial distribution."""
    p = 1 / (1 + math.exp(-interval))
    return LossDistribution(interval, -1, np.array([1 - p, 0, p]), 0.0)


def binomial_delta(interval, count, epsilon):
    """δ(ε) of randomized response, summed term by term."""
    p = 1 / (1 + math.exp(-interval))
    total = 0.0
    for k in range(count + 1):
        loss = (2 * k - count) * interval
        if loss > epsilon:
            log_p = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            log_p += k * math.log(p) + (count - k) * math.log1p(-p)
            total += math.exp(log_p) * -math.expm1(epsilon - loss)
    return total


@pytest.mark.parametrize("interval, count", [(0.5, 1), (0.5, 10), (0.05, 1000), (0.01, 20000)])
@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.1, 4.1])
def test_randomized_response(interval, count, epsilon):
    parts = [(randomized_response(interval), count)]
    exact = binomial_delta(interval, count, epsilon)
    delta = loss_distribution.delta(parts, epsilon)
    # `lgamma` of 20000 has an error of its own, about 1e-11.
    assert exact * (1 - 1e-9) <= delta <= exact * (1 + ROUND_OFF + 1e-9) + 1e-13
    if exact > 0:
        slope = max(1e-3, (exact - binomial_delta(interval, count, epsilon + 1e-6)) / 1e-6 / exact)
        found = loss_distribution.epsilon(parts, exact)
        assert epsilon - 1e-9 <= found <= epsilon + 3 * ROUND_OFF / slope + 1e-9


def test_the_error_is_relative_to_delta_in_a_million_steps():
    """δ is as small as 4e-15, where a plain Fourier transform has an error of 1e-10."""
    from scipy import stats

    interval, count = 1e-3, 10**6
    p = 1 / (1 + math.exp(-interval))
    k = np.arange(count + 1)
    losses = (2 * k - count) * interval
    for epsilon in (0.1, 2.0, 8.0):
        above = losses > epsilon
        terms = np.exp(stats.binom.logpmf(k[above], count, p)) * -np.expm1(epsilon - losses[above])
        found = loss_distribution.delta([(randomized_response(interval), count)], epsilon)
        assert found == pytest.approx(terms.sum() * (1 + ROUND_OFF), rel=2e-8)


@pytest.mark.parametrize("interval, count", [(1e-3, 10**6), (0.01, 10_000), (0.05, 1000)])
@pytest.mark.parametrize("deviations", [0.01, 0.1, 0.3, 1, 3, 8, 20])
def test_no_tilt_yields_too_small_values(interval, count, deviations):
    """A bad tilt makes the errors of the transform large; they are added to δ."""
    from scipy import stats

    p = 1 / (1 + math.exp(-interval))
    k = np.arange(count + 1)
    losses = (2 * k - count) * interval
    logs = stats.binom.logpmf(k, count, p)
    tilt = deviations / (interval * math.sqrt(count))
    parts = [(randomized_response(interval), count)]
    for epsilon in (0.0, 1.0, 5.0, 8.0):
        above = losses > epsilon
        exact = float(np.exp(logs[above]) @ -np.expm1(epsilon - losses[above]))
        assert loss_distribution.delta(parts, epsilon, tilt) >= exact
        if exact > 0:
            assert loss_distribution.epsilon(parts, exact, tilt) >= epsilon


@pytest.mark.parametrize("tilt", [0.1, 2.0, 12.0])
def test_heavy_tails_against_plain_convolution(tilt):
    """δ is the tail of a single step: the tilt cannot make it the bulk. Sums of positive terms are exact."""
    part, _ = step_loss.on_grid((step_loss.Pair(1.0, 1e-5, 1.0, False),), 1e-30, 0.02)
    total, start = part.probabilities, part.start
    for doubled in range(1, 6):
        total, start = np.convolve(total, total), 2 * start
        losses = (start + np.arange(len(total))) * 0.02
        for epsilon in (0.0, 0.1, 2.0):
            exact = float(total @ np.maximum(0, -np.expm1(np.minimum(0, epsilon - losses))))
            found = loss_distribution.delta([(part, 2**doubled)], epsilon, tilt)
            assert exact * (1 - 1e-12) <= found


def random_distribution(seed, start, size, infinite):
    """A random distribution of the loss of a pair (P, Q), for which E[e^-loss] is at most 1."""
    rng = np.random.default_rng(seed)
    losses = (start + np.arange(size)) * 0.1
    probabilities = rng.exponential(size=size)
    probabilities /= max(probabilities.sum(), probabilities @ np.exp(-losses))
    return LossDistribution(0.1, start, probabilities * (1 - infinite), infinite)


@pytest.mark.parametrize("delta", [1e-9, 1e-4, 0.1, 0.6])
def test_composition_of_different_steps_is_a_convolution(delta):
    parts = [(random_distribution(1, -4, 9, 1e-12), 3), (random_distribution(2, -20, 50, 0), 1)]
    total, start, infinite = np.ones(1), 0, 0.0
    for part, count in parts:
        for _ in range(count):
            total, start = np.convolve(total, part.probabilities), start + part.start
            infinite += part.infinite
    losses = (start + np.arange(len(total))) * 0.1
    slow = lambda e: infinite + np.sum(total * np.maximum(0, -np.expm1(e - losses)))  # noqa: E731
    found = loss_distribution.epsilon(parts, delta)
    assert slow(found) <= delta * (1 + 1e-9)
    assert found == 0 or slow(found) >= delta * (1 - 2 * ROUND_OFF)
    for epsilon in (0.0, 0.33, 1.0, 3.0):
        expected = min(1, slow(epsilon) * (1 + ROUND_OFF))
        assert loss_distribution.delta(parts, epsilon) == pytest.approx(expected, rel=1e-9)


def test_infinite_losses():
    parts = [(LossDistribution(0.1, 0, np.array([1 - 1e-6]), 1e-6), 100)]
    assert loss_distribution.epsilon(parts, 0.9e-4) == math.inf
    assert loss_distribution.epsilon(parts, 1.1e-4) == 0
    assert loss_distribution.delta(parts, 5.0) == pytest.approx(1 - (1 - 1e-6) ** 100, rel=1e-5)


def test_no_steps_and_steps_without_loss():
    assert loss_distribution.epsilon([], 1e-5) == 0
    assert loss_distribution.delta([], 0.0) == 0
    parts = [(LossDistribution(1e-3, 0, np.array([1.0]), 0.0), 1000)]
    assert loss_distribution.epsilon(parts, 1e-5) == 0
