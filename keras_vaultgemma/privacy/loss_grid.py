"""Composition of DP-SGD steps on a grid of privacy losses that is as fine as they need.

Rounding to a grid of interval Δ raises ε. By how much is known before anything is composed: with K
the cumulant generating function of a step's loss, the Chernoff bound of T steps is

    ε = (T K(λ) + ln c(λ) - ln δ) / λ,    c(λ) = λ^λ / (1 + λ)^(1 + λ),

at its minimum over the tilt λ. Quadrature yields K of the exact losses as well as of the rounded
ones, and T (K_rounded(λ) - K_exact(λ)) / λ is the increase of ε. The grid is the coarsest of those
with the intervals 1e-3, 1e-3 / 2, 1e-3 / 4, … for which the increase is below `TOLERANCE` of ε. For
normal losses with standard deviation s, that is about s / 9 in any number of steps, if it is below
1e-3.

References:
    - [Canonne et al., 2020](https://arxiv.org/abs/2004.00010), Proposition 12: the factor c(λ)
"""

import math

import numpy as np

from keras_vaultgemma.privacy import loss_distribution, step_loss
from keras_vaultgemma.privacy.loss_distribution import LARGEST_EXPONENT, minimiser

TOLERANCE = 1e-3
"""Relative increase of ε by the grid, about, unless the grid would be too large."""
DELTA_TOLERANCE = 1e-2
"""Relative increase of δ at a given ε by the grid, about, unless the grid would be too large."""

LARGEST_INTERVAL = 1e-3
"""Largest interval, unless the grid would be too large or ε is above `NO_PRIVACY`. It is that of
version 0.1.0. All smaller intervals are halves, quarters, … of it, whose grids contain its grid. So
no ε of an older ledger grows beyond the budget that was computed with it."""

LARGEST_STEP = 2**19
"""Largest number of losses of a step. It limits the accuracy where an ε below 0.25 comes from rare
and large losses of truncated batches: ε is then up to 10 % too large."""
LARGEST_COMPOSITION = 2**21
"""Largest number of losses of all steps, approximately."""

FAR = 8.0
"""Largest logarithm of the Chernoff bound's ratio to δ for which the tilt is not improved."""

NO_PRIVACY = 1000.0
"""An ε that needs no finer grid than the one that its Chernoff bound suggests."""

SMALLEST_DELTA = 1e-30
"""A δ below this is rounded up to its Chernoff bound."""

HALVINGS = 48
"""Range of the tilts that are tried, as a power of 2."""

SMALLEST_TAIL = 1e-280
SMALLEST_INTERVAL = 1e-100

TAIL_SHARE = 1e-6
"""Share of δ that may come from the losses of steps that are rounded to infinity."""


class _Composition:
    """Losses of all steps in one direction, exact up to the errors of quadrature."""

    def __init__(self, runs, direction, tail):
        """Create from a list of `(pairs, count)`; `direction` 0 is P against Q, 1 the reverse."""
        self.runs, self.direction, self.tail = runs, direction, tail
        self.steps, self.infinite = [], 0.0
        for pairs, count in runs:
            nodes = step_loss.quadrature(pairs, tail)
            losses, masses = (nodes.losses, nodes.p) if direction == 0 else (-nodes.losses, nodes.q)
            self.infinite += count * (nodes.below[1] if direction else nodes.above[0])
            with np.errstate(divide="ignore"):
                self.steps.append((losses, np.log(masses), count))
        # Beyond what a normal loss needs for δ = e^-2000. The loss may be all but constant.
        largest = max(float(np.abs(losses).max()) for losses, _, _ in self.steps)
        self.largest_tilt = 64 / max(
            math.sqrt(self.variance(0.0)), 1e-12 * largest, SMALLEST_INTERVAL
        )

    def tilted(self, losses, logs, tilt):
        """Return the cumulant K(tilt) of one loss, and its tilted probabilities."""
        exponents = logs + tilt * losses
        largest = exponents.max()
        probabilities = np.exp(exponents - largest)
        total = probabilities.sum()
        return float(largest + math.log(total)), probabilities / total

    def cumulant(self, tilt):
        """Return ln E[e^(tilt * sum of all losses)]."""
        return sum(count * self.tilted(x, logs, tilt)[0] for x, logs, count in self.steps)

    def variance(self, tilt):
        """Return the variance of the sum of all tilted losses."""
        total = 0.0
        for losses, logs, count in self.steps:
            probabilities = self.tilted(losses, logs, tilt)[1]
            total += count * float(probabilities @ (losses - probabilities @ losses) ** 2)
        return total

    def increase(self, interval, tilt):
        """Return by how much rounding to a grid increases `cumulant(tilt)`."""
        total = 0.0
        for losses, logs, count in self.steps:
            probabilities = self.tilted(losses, logs, tilt)[1]
            below = np.floor(losses / interval) * interval - losses
            upper = np.expm1(below) / math.expm1(-interval)
            ratio = (1 - upper) * np.expm1(tilt * below)
            ratio += upper * np.expm1(np.minimum(tilt * (below + interval), 700))
            total += count * math.log1p(max(0.0, float(probabilities @ ratio)))
        return total

    def log_delta(self, tilt, epsilon):
        """Return the logarithm of the Chernoff bound of δ(ε)."""
        factor = tilt * math.log(tilt) - (1 + tilt) * math.log1p(tilt)
        return self.cumulant(tilt) + factor - tilt * epsilon

    def best_tilt(self, epsilon):
        """Return the tilt with the smallest Chernoff bound of δ(ε)."""
        return minimiser(lambda t: self.log_delta(t, epsilon), self.largest_tilt, HALVINGS)

    def smallest(self, tilt):
        """Return the smallest interval of a grid that is not too large."""
        widths = [losses[np.isfinite(logs)] for losses, logs, _ in self.steps]
        width = max(float(losses.max() - losses.min()) for losses in widths)
        composed = 20 * math.sqrt(self.variance(tilt))
        return max(width / LARGEST_STEP, composed / LARGEST_COMPOSITION, SMALLEST_INTERVAL)

    def interval(self, tilt, increase, epsilon=0.0):
        """Return the largest interval that raises `cumulant(tilt)` by at most `increase`."""
        smallest = self.smallest(tilt)
        largest = 0 if epsilon < NO_PRIVACY else 14
        exponent = max(largest, math.ceil(math.log2(smallest / LARGEST_INTERVAL)))
        while True:
            interval = LARGEST_INTERVAL * 2.0**exponent
            if interval / 2 < smallest or self.increase(interval, tilt) <= increase:
                return interval
            exponent -= 1

    def on_grid(self, interval):
        """Return the list of `(LossDistribution, count)`."""
        return [
            (step_loss.on_grid(pairs, self.tail, interval)[self.direction], count)
            for pairs, count in self.runs
        ]


def epsilon(runs, delta):
    """Return an upper bound of the ε of a composition of steps.

    Args:
        runs: list of `(pairs, count)`: tuple of the `step_loss.Pair`s of a step, number of steps.
        delta: float in (0, 1).
    """
    if not runs:
        return 0.0
    # The finite losses may use all of δ but what the infinite ones do.
    log_delta = math.log(delta * (1 - 2 * TAIL_SHARE))
    result = 0.0
    for direction in (0, 1):
        losses = _Composition(runs, direction, _tail(delta, runs))

        def bound(tilt, losses=losses):
            return (losses.log_delta(tilt, 0.0) - log_delta) / tilt

        tilt = minimiser(bound, losses.largest_tilt, HALVINGS)
        # Otherwise this direction has the smaller ε.
        if bound(tilt) > result:
            result = max(result, _epsilon(losses, tilt, bound(tilt), delta, result))
    return result


def _epsilon(losses, tilt, bound, delta, known):
    """Return the ε of losses in one direction, or any upper bound of it up to `known`.

    Args:
        losses: `_Composition`.
        tilt, bound: floats. The tilt with the smallest Chernoff bound of ε, and that bound.
        delta: float in (0, 1).
        known: float. ε of the other direction, or 0. A smaller one needs no finer grid.
    """

    def on_grid(interval, largest=math.inf):
        return loss_distribution.epsilon(losses.on_grid(interval), delta, tilt, largest)

    interval = losses.interval(tilt, TOLERANCE * bound * tilt, bound)
    found, worse = on_grid(interval), math.inf
    # Losses far below the bound are cut off (see `loss_distribution`), and ε may be one of them.
    is_cut = found < bound - LARGEST_EXPONENT / 2
    while is_cut and found > max(known, LARGEST_EXPONENT):
        at_half = losses.best_tilt(found / 2)
        if loss_distribution.delta(losses.on_grid(interval), found / 2, at_half) > delta:
            break
        found /= 2
    # The best tilt for the bound's ε is a bad one for an ε far below it.
    while known < found < min(NO_PRIVACY, 0.99 * worse) and (
        is_cut or losses.log_delta(tilt, found) > math.log(delta) + FAR
    ):
        tilt = losses.best_tilt(found)
        worse, found = found, min(found, on_grid(interval, found))
    error = math.inf if found < bound / 2 else 0.0
    while known < found < NO_PRIVACY and (
        interval > LARGEST_INTERVAL
        or losses.increase(interval, tilt) > 2 * TOLERANCE * found * tilt
    ):
        finer = losses.interval(tilt, TOLERANCE * found * tilt)
        if finer >= interval:
            break
        finer_found = on_grid(finer)
        # The error is proportional to the interval or to a higher power of it.
        error = min(error, (found - finer_found) / (interval / finer - 1))
        interval, found = finer, finer_found
    # For an ε far below its bound, `increase` is too small: halve until ε does not change either.
    while found > known and error > 2 * TOLERANCE * found and interval / 2 >= losses.smallest(tilt):
        interval /= 2
        coarser, found = found, on_grid(interval)
        error = coarser - found
    return found


def delta(runs, epsilon):
    """Return an upper bound of the δ of a composition of steps.

    Args:
        runs: list of `(pairs, count)`, as for `epsilon`.
        epsilon: float, 0 or more.
    """
    if not runs:
        return 0.0
    # δ(0) is the total variation distance, which is the same in both directions.
    result = 0.0
    for direction in (0, 1) if epsilon > 0 else (0,):
        result = max(result, _delta(runs, direction, epsilon, max(result, SMALLEST_DELTA)))
    return result


def _delta(runs, direction, epsilon, known):
    """Return δ(ε) of losses in one direction, or any upper bound of it up to `known`."""
    found, tail = 1e-4, math.inf
    while tail > (tail := _tail(max(found, SMALLEST_DELTA), runs)):
        losses = _Composition(runs, direction, tail)
        tilt = losses.best_tilt(epsilon)
        bound = math.exp(min(0.0, losses.log_delta(tilt, epsilon))) + losses.infinite
        if bound <= known:
            return bound
        interval, coarser, found = 2 * losses.interval(tilt, DELTA_TOLERANCE), math.inf, 1.0
        while coarser > found * (1 + DELTA_TOLERANCE) and interval / 2 >= losses.smallest(tilt):
            interval /= 2
            coarser = found
            found = loss_distribution.delta(losses.on_grid(interval), epsilon, tilt)
    return found


def _tail(delta, runs):
    """Return the largest power of 1000 that keeps infinite losses below `TAIL_SHARE` of `delta`."""
    steps = sum(count for _, count in runs)
    share = max(SMALLEST_TAIL, TAIL_SHARE * delta / steps)
    return 1000.0 ** math.floor(math.log(share, 1000))
