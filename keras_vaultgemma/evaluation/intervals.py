"""Confidence intervals: of rates (Clopper-Pearson), of their differences, and by the bootstrap."""

import math
from dataclasses import dataclass

import numpy as np

from keras_vaultgemma.evaluation.results import Result


@dataclass(frozen=True)
class Rate(Result):
    """A rate with its numerator, its denominator and a confidence interval.

    Attributes:
        count: int. Numerator.
        total: int. Denominator.
        value: float. `count / total`, NaN if `total` is 0.
        low, high: float. Two-sided confidence interval.
        at_most: float. One-sided upper confidence bound, for sentences such as "at most 0.25 %".
        confidence: float. Confidence of the interval, and of the bound.

    Example:

    ```python
    from keras_vaultgemma.evaluation import Rate

    print(Rate.of(0, 1200))  # 0 of 1,200, at most 0.25 % (95 % confidence)
    ```
    """

    count: int
    total: int
    value: float
    low: float
    high: float
    at_most: float
    confidence: float

    @classmethod
    def of(cls, count: int, total: int, confidence: float = 0.95) -> "Rate":
        """Return the rate of `count` in `total` independent trials, with Clopper-Pearson bounds."""
        count, total = int(count), int(total)
        low, high = clopper_pearson(count, total, confidence)
        _, at_most = clopper_pearson(count, total, 2 * confidence - 1)
        value = count / total if total else math.nan
        return cls(count, total, value, low, high, at_most, confidence)

    def __str__(self):
        bound = f"at most {100 * self.at_most:.2g} %"
        if self.count:
            bound = f"{100 * self.low:.2g} % to {100 * self.high:.2g} %"
        sure = f"({100 * self.confidence:g} % confidence)"
        return f"{self.count:,} of {self.total:,}, {bound} {sure}"


def clopper_pearson(count, total, confidence=0.95):
    """Return the exact two-sided confidence interval of a binomial probability.

    Args:
        count: int. Number of successes.
        total: int. Number of trials. With none, the interval is [0, 1].
        confidence: float in (0, 1). Defaults to 0.95.

    Returns:
        Tuple of two floats.

    References:
        - [Clopper and Pearson, 1934](https://doi.org/10.1093/biomet/26.4.404)
    """
    tail, beta = (1 - confidence) / 2, import_stats().beta
    low = float(beta.ppf(tail, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return low, high


def bootstrap(statistic, samples, confidence=0.95, seed=0, repetitions=1000):
    """Return the percentile bootstrap interval of a statistic of independent samples.

    Args:
        statistic: callable of as many arrays as there are samples, which returns an array.
        samples: list of NumPy arrays, each of which is resampled along its first axis.
        confidence: float in (0, 1). Defaults to 0.95.
        seed: int. Defaults to 0.
        repetitions: int. Defaults to 1,000.

    Returns:
        Tuple `(low, high)` of arrays of the statistic's shape.

    References:
        - [Efron, 1979](https://doi.org/10.1214/aos/1176344552)
    """
    generator = np.random.default_rng(seed)
    values = [
        statistic(*(x[generator.integers(0, len(x), len(x))] for x in samples))
        for _ in range(repetitions)
    ]
    tail = (1 - confidence) / 2
    return tuple(np.quantile(values, [tail, 1 - tail], axis=0))


def import_stats():
    """Return `scipy.stats`."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            f"Confidence bounds need SciPy: pip install 'keras-vaultgemma[report]' ({error})"
        ) from error
    return stats
