"""Privacy loss of one DP-SGD step, and its rounding to a grid.

A step is a mixture of at most two pairs (P, Q) of distributions on the real line, in units of the
clipping norm (see `accounting` for the mechanism):

- A batch that is not truncated: P = (1 - q) N(0, σ²) + q N(1, σ²) and Q = N(0, σ²).
- A truncated batch, in which the record displaces another one: P = (1 - q') N(0, σ²/4) +
  q' N(1, σ²/4) and Q = (1 - q') N(0, σ²/4) + q' N(-1, σ²/4). Its weight is the probability that
  at least Bmax of the other N - 1 records are drawn, and q' is the probability that the record is
  in a batch, given that. Both are those of `from_truncated_subsampled_gaussian_mechanism` in
  dp-accounting 0.6.0.

In each pair the loss ln(dP/dQ) increases with x and has an inverse in closed form.

**Rounding.** The probabilities P(cell) and Q(cell) of all losses in a cell [iΔ, (i + 1)Δ] are
divided between the two ends so that both sums are preserved. That is the "connect the dots" of
Doroshenko et al.: δ(ε) is exact at the points of the grid, never below the true value in between,
and composition preserves this order.

**Rounding errors.** Doroshenko et al. compute the probabilities as second differences of δ(ε), as
dp-accounting does. The differences cancel: an error of 1e-16 in δ becomes 1e-16 / Δ, which exceeds
all of δ after a million steps on a fine grid. Here every probability is an integral of positive
terms, so its relative error is about 1e-14 on any grid. The integrals are computed by
Gauss-Legendre quadrature on panels whose edges include all edges of cells, because the integrand is
smooth between them.

References:
    - [Chua et al., 2024](https://arxiv.org/abs/2411.04205): truncated Poisson sampling
    - [Doroshenko et al., 2022](https://arxiv.org/abs/2207.04380): connect the dots
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from keras_vaultgemma.privacy.loss_distribution import LARGEST_EXPONENT, LossDistribution

NODES = ((8, 1.0), (4, 1 / 16), (2, 1 / 1024))
"""Numbers of nodes of panels up to a share of the largest width. With them the relative error of a
probability is about 1e-14."""


class Pair(NamedTuple):
    """A pair of distributions: P = (1 - q) N(0, σ²) + q N(1, σ²) against Q.

    Attributes:
        weight: float in (0, 1]. Probability of the pair in the mixture of pairs.
        probability: float in (0, 1]. q.
        deviation: float. σ.
        symmetric: bool. If True, Q = (1 - q) N(0, σ²) + q N(-1, σ²), else Q = N(0, σ²).
    """

    weight: float
    probability: float
    deviation: float
    symmetric: bool

    def loss(self, x):
        """Return ln(dP/dQ) at the points `x`."""
        return self._one_sided(x) - self._one_sided(-x) if self.symmetric else self._one_sided(x)

    def _one_sided(self, x):
        """Return ln(1 - q + q e^u) with u = (2x - 1) / 2σ²."""
        q, u = self.probability, (2 * x - 1) / (2 * self.deviation**2)
        if q == 1:
            return u
        if u.max() < LARGEST_EXPONENT:
            result = np.log1p(q * np.expm1(u))
        else:
            result = np.log1p(q * np.expm1(np.minimum(u, 1)))
            large = u + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(u, 1)))
            result = np.where(u < 1, result, large)
        if q > 0.5:
            # Here 1 - q + q e^u may be far below 1, and then q and 1 cancel.
            small = np.log(1 - q + q * np.exp(np.minimum(u, 0)))
            result = np.where(u < -1, small, result)
        return result

    def points(self, losses):
        """Return the points x at which the loss has the values `losses`."""
        q, scale = self.probability, self.deviation**2
        if self.symmetric:
            # (1 - q) sinh(loss / 2) = q e^(-1 / 2σ²) sinh(x / σ² - loss / 2)
            if q == 1:
                return scale * losses / 2
            with np.errstate(divide="ignore"):
                half = np.abs(losses) / 2
                log_sinh = half + np.log(-np.expm1(-2 * half) / 2)
            log_ratio = math.log1p(-q) - math.log(q) + 1 / (2 * scale) + log_sinh
            inverse = np.where(
                log_ratio > 20,
                log_ratio + math.log(2),
                np.arcsinh(np.exp(np.minimum(log_ratio, 20))),
            )
            return scale * (losses / 2 + np.sign(losses) * inverse)
        # NaN or -inf for losses that no point has.
        with np.errstate(divide="ignore", invalid="ignore"):
            small = np.log1p(np.expm1(np.clip(losses, -1, 1)) / q)
            large = losses - math.log(q) + np.log1p((q - 1) * np.exp(np.minimum(-losses, 700)))
        return 0.5 + scale * np.where(np.abs(losses) < 1, small, large)

    def densities(self, x):
        """Return the densities of P and Q at the points `x`."""
        q = self.probability
        middle, right = self._normal(x), self._normal(x - 1)
        p = (1 - q) * middle + q * right
        return p, (1 - q) * middle + q * self._normal(x + 1) if self.symmetric else middle

    def _normal(self, x):
        factor = 1 / (math.sqrt(2 * math.pi) * self.deviation)
        return factor * np.exp(-0.5 * (x / self.deviation) ** 2)

    def above(self, x):
        """Return the probabilities of P and Q beyond a point `x`."""
        q = self.probability

        def normal(x):
            return math.erfc(x / (math.sqrt(2) * self.deviation)) / 2

        p = (1 - q) * normal(x) + q * normal(x - 1)
        return p, (1 - q) * normal(x) + q * normal(x + 1) if self.symmetric else normal(x)

    def below(self, x):
        """Return the probabilities of P and Q below a point `x`."""
        q = self.probability

        def normal(x):
            return math.erfc(-x / (math.sqrt(2) * self.deviation)) / 2

        p = (1 - q) * normal(x) + q * normal(x - 1)
        return p, (1 - q) * normal(x) + q * normal(x + 1) if self.symmetric else normal(x)

    def ends(self, tail):
        """Return `(low, high)`: Q has at most `tail` below `low`, and P has it above `high`."""

        def quantile(tail):
            """Return a point beyond which N(0, σ²) has less than e^(-x² / 2σ²) = `tail`."""
            return self.deviation * math.sqrt(max(0.0, -2 * math.log(tail)))

        high = max(quantile(tail), 1 + quantile(tail / self.probability))
        return (-high if self.symmetric else -quantile(tail)), high


class Quadrature(NamedTuple):
    """Nodes of a step's loss: float64 arrays of shape `[n]`, and the probabilities outside them.

    Attributes:
        losses: losses at the nodes.
        p, q: probabilities of the nodes under P and under Q.
        above, below: pairs of floats. Probabilities under P and Q of the losses beyond the nodes.
    """

    losses: np.ndarray
    p: np.ndarray
    q: np.ndarray
    above: tuple[float, float]
    below: tuple[float, float]


@functools.cache
def _gauss_legendre(count):
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def _nodes(edges, largest):
    """Return the nodes of the panels between `edges`, and their weights, which are lengths."""
    widths = np.diff(edges)
    x, weights = [], []
    groups = np.digitize(widths, [share * largest for _, share in NODES[1:]])
    for group, (count, _) in enumerate(NODES):
        nodes, shares = _gauss_legendre(count)
        chosen = groups == group
        width = widths[chosen, None]
        x.append((edges[:-1][chosen, None] + width * nodes).ravel())
        weights.append((width * shares).ravel())
    return np.concatenate(x), np.concatenate(weights)


def pairs(rows, sampling_probability, max_batch_size, noise_multiplier):
    """Return the list of `Pair` that a step is a mixture of."""
    whole = Pair(1.0, float(sampling_probability), float(noise_multiplier), False)
    if max_batch_size is None or max_batch_size >= rows:
        return (whole,)
    try:
        from scipy import special
    except ImportError as error:
        raise ImportError(
            f"Privacy accounting needs SciPy: pip install 'keras-vaultgemma[privacy]' ({error})"
        ) from error

    def more_than(drawn, rows):
        """Return the probability that more than `drawn` of `rows` records are drawn."""
        return float(special.betainc(drawn + 1, rows - drawn, sampling_probability))

    weight = more_than(max_batch_size - 1, rows - 1)
    if weight < 1e-250:
        return (whole,)
    both = more_than(max_batch_size, rows)
    conditional = min(1.0, both / weight * (max_batch_size / rows))
    displaced = Pair(weight, conditional, noise_multiplier / 2, True)
    return (whole._replace(weight=1 - weight), displaced)


@functools.lru_cache(maxsize=64)
def quadrature(parts, tail, interval=None):
    """Return the `Quadrature` of a mixture of pairs.

    Args:
        parts: list of `Pair`.
        tail: float. Largest probability that may lie beyond the nodes, at either end.
        interval: float or None. Interval of the grid whose cells the panels are part of. None
            stands for no grid.
    """
    losses, p, q = [], [], []
    above, below = np.zeros(2), np.zeros(2)
    for pair in parts:
        if pair.weight * 2 <= tail:
            above += pair.weight
            continue
        low, high = pair.ends(tail / (2 * pair.weight))
        panel = min(pair.deviation / 2, pair.deviation**2)
        edges = np.linspace(low, high, 2 + math.ceil((high - low) / panel))
        if interval is not None:
            first, last = (math.floor(pair.loss(np.array(x)) / interval) for x in (low, high))
            cells = pair.points(np.arange(first + 1, last + 1) * interval)
            edges = np.sort(np.concatenate([edges, cells[(cells > low) & (cells < high)]]))
        x, weights = _nodes(edges, panel)
        densities = pair.densities(x)
        losses.append(pair.loss(x))
        p.append(pair.weight * weights * densities[0])
        q.append(pair.weight * weights * densities[1])
        above += pair.weight * np.array(pair.above(high))
        below += pair.weight * np.array(pair.below(low))
    return Quadrature(
        np.concatenate(losses), np.concatenate(p), np.concatenate(q), tuple(above), tuple(below)
    )


@functools.lru_cache(maxsize=8)
def on_grid(parts, tail, interval):
    """Return the `LossDistribution` of a step with and without the record, and of the reverse.

    Args:
        parts: list of `Pair`.
        tail: float. Largest probability that is rounded to infinite losses.
        interval: float. Distance of two losses of the grid.

    Returns:
        Pair of `LossDistribution`: of P against Q and of Q against P.
    """
    whole = quadrature.__wrapped__(parts, tail, interval)
    cells = np.floor(whole.losses / interval).astype(np.int64)
    first, last = int(cells.min()), int(cells.max()) + 1
    inside = whole.losses - cells * interval
    size = last - first + 1
    # The share of P and of Q that goes to the upper end of the cell.
    share_p = np.expm1(-inside) / math.expm1(-interval)
    share_q = np.expm1(inside) / math.expm1(interval)
    cells -= first

    def divided(mass, share):
        upper = mass * share
        at_lower = np.bincount(cells, mass - upper, minlength=size)
        return at_lower + np.bincount(cells + 1, upper, minlength=size)

    p, q = divided(whole.p, share_p), divided(whole.q, share_q)[::-1].copy()
    # Losses below the grid are rounded up to its first point.
    p[0] += whole.below[0]
    q[0] += whole.above[1]
    return (
        LossDistribution(interval, first, p, whole.above[0]),
        LossDistribution(interval, -last, q, whole.below[1]),
    )
