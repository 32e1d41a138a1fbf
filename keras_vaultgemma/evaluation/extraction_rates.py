"""Rates of extraction: of a model, of a part of the records, and their excess over others."""

import math
from dataclasses import dataclass

import numpy as np

from keras_vaultgemma.evaluation.intervals import Rate, clopper_pearson
from keras_vaultgemma.evaluation.results import Result
from keras_vaultgemma.evaluation.texts import compressed_size, contents_of

APPROXIMATE = 0.1
"""Largest edit distance, as a fraction of the suffix, that counts as an approximate match."""

ATTEMPTS = ((1, 0.5), (100, 0.5), (10_000, 0.5), (10_000, 0.1))
"""The (n, p) of probabilistic extraction that are reported."""


@dataclass(frozen=True)
class Probabilistic(Result):
    """Rate of records that n sampled continuations contain with probability p or more.

    Attributes:
        attempts: int. n.
        probability: float. p.
        rate: `Rate`.
    """

    attempts: int
    probability: float
    rate: Rate


@dataclass(frozen=True)
class Extraction(Result):
    """What one model reveals about one set of records.

    Attributes:
        exact: `Rate` of records whose suffix the greedy continuation equals.
        approximate: `Rate` of records whose suffix it equals up to an edit distance of 10 %.
        probabilistic: tuple of `Probabilistic`.
        median_distance: float. Median edit distance, from 0 (equal) to 1, of 1,000 random records.
        fewest_attempts: float. Sampled continuations that find the suffix of the most exposed
            record with probability one half.
    """

    exact: Rate
    approximate: Rate
    probabilistic: tuple[Probabilistic, ...]
    median_distance: float
    fewest_attempts: float


@dataclass(frozen=True)
class Excess(Result):
    """Difference of two rates of extraction, with a confidence interval.

    Attributes:
        over: string. What is subtracted: "baseline" (records that only the baseline model reveals,
            from those that only the model reveals) or "controls".
        measure: string. "exact" or "approximate".
        value, low, high: float. The difference and its bounds, from Clopper-Pearson bounds of both
            rates.
        first, second: `Rate`. What the difference is of.
    """

    over: str
    measure: str
    value: float
    low: float
    high: float
    first: Rate
    second: Rate


@dataclass(frozen=True)
class Stratum(Result):
    """Extraction of a part of the records.

    Attributes:
        by: string. "duplicates" (number of equal records) or "entropy" (bytes that zlib compresses
            a byte of the text to).
        low, high: float. Smallest and largest value in the stratum.
        exact, approximate: `Rate`.
        baseline_exact, baseline_approximate: `Rate` of the baseline model, or None.
    """

    by: str
    low: float
    high: float
    exact: Rate
    approximate: Rate
    baseline_exact: Rate | None
    baseline_approximate: Rate | None


def _matches(extracted):
    """Return bool arrays of exact and of approximate matches."""
    distances = extracted.distances
    return {"exact": distances == 0, "approximate": distances <= APPROXIMATE}


def _rate(matches, confidence):
    return Rate.of(np.sum(matches), len(matches), confidence)


def summarize(extracted, confidence):
    """Return the `Extraction` of `Extracted` windows."""
    rates = {name: _rate(x, confidence) for name, x in _matches(extracted).items()}
    with np.errstate(divide="ignore"):
        log_missed = np.log1p(-np.exp(np.minimum(extracted.log_probabilities, 0.0)))
    fewest = math.log(2) / -log_missed.min() if log_missed.min() else math.inf
    return Extraction(
        **rates,
        probabilistic=tuple(
            Probabilistic(n, p, _rate(n * log_missed <= math.log1p(-p), confidence))
            for n, p in ATTEMPTS
        ),
        median_distance=extracted.median_distance,
        fewest_attempts=max(1.0, float(fewest)),
    )


def _difference(over, measure, counts, totals, confidence):
    """Return the `Excess` of one rate over another; each bound has half of the error."""
    first, second = (Rate.of(n, of, confidence) for n, of in zip(counts, totals, strict=True))
    half = (1 + confidence) / 2
    (a, b), (c, d) = (clopper_pearson(n, of, half) for n, of in zip(counts, totals, strict=True))
    return Excess(over, measure, first.value - second.value, a - d, b - c, first, second)


def excess_over_baseline(extracted, baseline, confidence):
    """Yield the `Excess` of one model over another, for the same windows."""
    ours, theirs = _matches(extracted), _matches(baseline)
    for name in ours:
        counts = [int(np.sum(ours[name] & ~theirs[name])), int(np.sum(theirs[name] & ~ours[name]))]
        yield _difference("baseline", name, counts, [len(ours[name])] * 2, confidence)


def excess_over_controls(extracted, controls, confidence):
    """Yield the `Excess` of some windows over others, for one model."""
    ours, theirs = _matches(extracted), _matches(controls)
    for name in ours:
        counts = [int(ours[name].sum()), int(theirs[name].sum())]
        totals = [len(ours[name]), len(theirs[name])]
        yield _difference("controls", name, counts, totals, confidence)


def stratify(windows, duplicates, model, extracted, baseline, confidence):
    """Return strata by powers of two of the duplicates, and by thirds of the zlib entropy."""
    contents = contents_of(windows.tolist(), model)
    entropy = np.array([compressed_size(x) / max(len(x), 1) for x in contents])
    thirds = np.searchsorted(np.quantile(entropy, [1 / 3, 2 / 3]), entropy)
    doublings = np.log2(duplicates).astype(int)
    ours, theirs = _matches(extracted), None if baseline is None else _matches(baseline)
    strata = []
    for by, values, groups in (
        ("duplicates", np.array(duplicates, float), doublings),
        ("entropy", entropy, thirds),
    ):
        for group in np.unique(groups):
            chosen = groups == group
            rates = [_rate(ours[name][chosen], confidence) for name in ours]
            rates += [
                None if theirs is None else _rate(theirs[name][chosen], confidence) for name in ours
            ]
            low, high = float(values[chosen].min()), float(values[chosen].max())
            strata.append(Stratum(by, low, high, *rates))
    return tuple(strata)
