"""Privacy loss distributions of many composed steps: from the distribution of one step to ε and δ.

A pair of distributions (P, Q) has the privacy loss ln(dP/dQ), and the distribution of that under P. The losses of
independent steps add up, so that T steps have the T-fold convolution; δ(ε) = E[max(0, 1 - e^(ε - loss))] (Koskela et
al., 2020, arXiv:1906.03049).

One Fourier transform raised to the power T has an absolute error of about T x 1e-16. After the 100,000 steps of
VaultGemma that is a tenth of its δ of 1.1e-10, of either sign: dp-accounting 0.6.0 gives ε = 1.7092 where 1.7105 is
true. The same convolution is therefore made of exponentially tilted distributions, p(x) e^(λx) / E[e^(λx)], with λ
where the tail beyond ε becomes the bulk: the error is then relative to δ (Alghamdi et al., 2022, arXiv:2208.09595, for
the choice of λ).
"""

import math
from typing import NamedTuple

import numpy as np

ROUND_OFF = 1e-6
"""δ is taken to be larger by this part than what was computed. The error of the convolution is 2e-9 of δ in a million
steps: tests/test_loss_distribution.py measures it where the composition is known in closed form."""

OUTSIDE = 40.0
"""The grid holds all of the tilted distribution but e^-OUTSIDE of it at either end."""

LARGEST = 300.0
"""Of an exponent; float64 ends at 709, and two factors are multiplied."""


class LossDistribution(NamedTuple):
    """Distribution of a privacy loss on a grid, as an upper bound: of no ε is its δ(ε) below the true one.

    Attributes:
        interval: distance of two losses.
        start: int, the first loss in units of `interval`.
        probabilities: float64 [n], of the losses `start`, `start + 1`, ….
        infinite: probability of an infinite loss.
    """

    interval: float
    start: int
    probabilities: np.ndarray
    infinite: float

    @property
    def losses(self):
        return (self.start + np.arange(len(self.probabilities))) * self.interval


def epsilon(parts, delta):
    """The smallest ε at which the composition's δ(ε) is at most `delta`, rounded up.

    Args:
        parts: list of pairs of a `LossDistribution` and the number of steps that have it, all on the same interval.
        delta: in (0, 1).

    Returns:
        float, 0 or more; infinity where infinite losses alone exceed `delta`.
    """
    if not parts:
        return 0.0
    delta = delta / (1 + ROUND_OFF)
    if _infinite(parts) >= delta:
        return math.inf
    cumulants = [_Cumulants(part, count) for part, count in parts]

    def bound(tilt):
        """Chernoff: δ(ε) <= E[e^(λ (loss - ε))], which is at most δ at this ε, whatever λ."""
        return (sum(c.value(tilt) for c in cumulants) - math.log(delta)) / tilt

    tilt = _minimiser(bound, 1 / parts[0][0].interval)
    centre = bound(tilt)
    losses, upper, lower = _tails(parts, cumulants, tilt, centre)
    # δ(ε) = upper - e^(ε - centre) lower for ε between a loss of the grid and the one before it.
    before = losses - parts[0][0].interval
    before = before[before < centre]
    too_large = np.flatnonzero(
        upper[: len(before)] - np.exp(before - centre) * lower[: len(before)] > delta
    )
    if not len(too_large):
        return max(0.0, float(losses[0]))
    last = too_large[-1]
    return max(0.0, centre + math.log((upper[last] - delta) / lower[last]))


def delta(parts, epsilon):
    """The composition's δ(ε), rounded up, in [0, 1]; arguments as in `epsilon`."""
    if not parts:
        return 0.0
    cumulants = [_Cumulants(part, count) for part, count in parts]

    def bound(tilt):
        """Chernoff, as above: the logarithm of a bound of δ(ε)."""
        return sum(c.value(tilt) for c in cumulants) - tilt * epsilon

    tilt = _minimiser(bound, 1 / parts[0][0].interval)
    losses, upper, lower = _tails(parts, cumulants, tilt, epsilon)
    above = np.searchsorted(losses, epsilon, side="right")
    if above == len(losses):
        return _infinite(parts)
    return min(1.0, float(upper[above] - lower[above]) * (1 + ROUND_OFF))


def _infinite(parts):
    return -math.expm1(sum(count * math.log1p(-part.infinite) for part, count in parts))


class _Cumulants:
    """Logarithm of E[e^(tilt x loss)] of the sum of `count` losses, infinite ones left out, and what belongs to it."""

    def __init__(self, part, count):
        with np.errstate(divide="ignore"):
            self.logs = np.log(part.probabilities)
        self.losses, self.count = part.losses, count

    def value(self, tilt):
        exponents = self.logs + tilt * self.losses
        largest = exponents.max()
        return self.count * float(largest + np.log(np.exp(exponents - largest).sum()))

    def tilted(self, tilt):
        """Probabilities of one loss under tilting, float64 [n]."""
        return np.exp(self.logs + tilt * self.losses - self.value(tilt) / self.count)

    def variance(self, tilt):
        probabilities = self.tilted(tilt)
        return self.count * float(probabilities @ (self.losses - probabilities @ self.losses) ** 2)


def _minimiser(function, largest):
    """Where in (0, largest] a function, decreasing and then increasing, is least, to about 1 %.

    Any tilt gives the same convolution, this one with the least error. Beyond 1 / interval it would tell apart what the
    grid does not.
    """
    places = largest / 2.0 ** np.arange(32)
    place = places[int(np.argmin([function(x) for x in places]))]
    low, high = place / 2, min(largest, place * 2)
    for _ in range(12):
        first, second = low * (high / low) ** (1 / 3), low * (high / low) ** (2 / 3)
        low, high = (low, second) if function(first) < function(second) else (first, high)
    return math.sqrt(low * high)


def _tails(parts, cumulants, tilt, centre):
    """Sums over the composed distribution from each loss of a grid on.

    Returns:
        `(losses, upper, lower)`, float64 [n]: the sum of p(x) over x >= loss, infinite losses included, and that of
        p(x) e^(centre - x).
    """
    interval = parts[0][0].interval
    total = sum(c.value(tilt) for c in cumulants)
    deviation = max(interval, math.sqrt(sum(c.variance(tilt) for c in cumulants)))
    steps = [2.0**k / deviation for k in range(-4, 6)]
    up = min((sum(c.value(tilt + s) for c in cumulants) - total + OUTSIDE) / s for s in steps)
    down = max((total - sum(c.value(tilt - s) for c in cumulants) - OUTSIDE) / s for s in steps)
    first, last = math.floor(down / interval), math.ceil(up / interval)
    size = _fast_length(max(last - first + 1, *(len(part.probabilities) for part, _ in parts)))
    # Further below the centre the factors would overflow, and what is there counts for nothing above it.
    first = max(first, math.floor(max((total - LARGEST) / tilt, centre - LARGEST) / interval))
    transform = 1.0
    for (_, count), c in zip(parts, cumulants, strict=True):
        transform = transform * np.fft.rfft(c.tilted(tilt), size) ** count
    start = sum(count * part.start for part, count in parts)
    places = np.arange(first, last + 1)
    tilted = np.maximum(np.fft.irfft(transform, size)[(places - start) % size], 0)
    losses = places * interval
    probabilities = tilted * np.exp(total - tilt * losses)
    upper = _infinite(parts) + np.cumsum(probabilities[::-1])[::-1]
    return losses, upper, np.cumsum((probabilities * np.exp(centre - losses))[::-1])[::-1]


def _fast_length(size):
    """The smallest 2^a 3^b that is not below `size`."""
    return min(2 ** max(0, math.ceil(math.log2(size / 3**b))) * 3**b for b in range(12))
