"""Truncated Poisson sampling against the laws it must follow.

The secret is fixed, so that a test always gives the same answer; each states how often it would fail for a new one.
"""

import time

import numpy as np
import pytest
from scipy import stats

from keras_vaultgemma.privacy import sampling
from keras_vaultgemma.privacy.seeds import new_secret

pytestmark = pytest.mark.any_backend

SECRET = bytes(range(16))


def samples(steps, *args):
    return [sampling.sample_rows(SECRET, step, *args) for step in range(steps)]


def test_every_row_is_drawn_with_probability_q():
    """χ² of the inclusion counts of 50 rows, and no other two-row pattern: false alarms once in 1e6 each."""
    steps, count, q = 20_000, 50, 0.13
    drawn = np.zeros((steps, count), bool)
    for step, rows in enumerate(samples(steps, count, q)):
        drawn[step, rows] = True
    counts = drawn.sum(axis=0)
    chi = ((counts - steps * q) ** 2 / (steps * q * (1 - q))).sum()
    assert stats.chi2.ppf(5e-7, count) < chi < stats.chi2.isf(5e-7, count)
    # Independent rows: correlations of neighbours, which one geometric gap decides, and of equal rows in two steps.
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        z = ((one - q) * (other - q)).sum() / (np.sqrt(one.size) * q * (1 - q))
        assert abs(z) < stats.norm.isf(5e-7)


@pytest.mark.parametrize("count, q", [(50, 0.13), (400, 0.01), (7, 0.9)])
def test_batch_sizes_are_binomial(count, q):
    """χ² over sizes that are expected ten times or more: a false alarm once in 1e6."""
    steps = 10_000
    sizes = np.bincount([len(rows) for rows in samples(steps, count, q)], minlength=count + 1)
    expected = steps * stats.binom.pmf(np.arange(count + 1), count, q)
    common = expected >= 10
    observed = np.append(sizes[common], sizes[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    chi = ((observed - expected) ** 2 / expected).sum()
    assert chi < stats.chi2.isf(1e-6, common.sum())


def test_large_samples_are_cut_off_as_often_as_the_binomial_says():
    """Two-sided binomial test at 1e-6, and χ² of who remains at 1e-6: truncation prefers no row."""
    steps, count, q, largest = 20_000, 40, 0.3, 13
    whole, cut = samples(steps, count, q), samples(steps, count, q, largest)
    truncated = [len(rows) > largest for rows in whole]
    p = stats.binom.sf(largest, count, q)
    assert stats.binomtest(sum(truncated), steps, p).pvalue > 1e-6
    assert all(len(rows) <= largest for rows in cut)
    for before, after, too_large in zip(whole, cut, truncated, strict=True):
        assert set(after) <= set(before)
        assert len(after) == largest if too_large else np.array_equal(before, after)
    inside = np.array(
        [
            np.isin(np.arange(count), rows)
            for rows, cut_off in zip(cut, truncated, strict=True)
            if cut_off
        ]
    )
    # `largest` of `count` rows in each, exchangeable: the counts' covariance has rank count - 1.
    share = largest / count
    scale = len(inside) * share * (1 - share) * count / (count - 1)
    chi = ((inside.sum(axis=0) - len(inside) * share) ** 2 / scale).sum()
    assert stats.chi2.ppf(5e-7, count - 1) < chi < stats.chi2.isf(5e-7, count - 1)


def test_gaps_are_the_literal_decisions():
    """The same law as one decision for each row: how many rows in each of four quarters, against NumPy's Bernoulli draws.

    Kolmogorov-Smirnov of two samples at 1e-6."""
    rng = np.random.default_rng(3)
    slow = [np.flatnonzero(rng.random(1000) < 0.05) for _ in range(4000)]
    fast = samples(4000, 1000, 0.05)
    for quarter in range(4):
        counts = [[np.sum(rows // 250 == quarter) for rows in found] for found in (slow, fast)]
        assert stats.ks_2samp(*counts).pvalue > 1e-6


def test_a_step_never_repeats_and_always_returns():
    """A resume that knows the secret, as only a test does, finds the batch of each step again, in any order."""
    straight = samples(20, 10_000, 0.01, 120)
    for step in (7, 19, 0):
        assert np.array_equal(sampling.sample_rows(SECRET, step, 10_000, 0.01, 120), straight[step])
    assert len({rows.tobytes() for rows in straight}) == 20
    other = sampling.sample_rows(new_secret(), 7, 10_000, 0.01, 120)
    assert not np.array_equal(other, straight[7])


def test_all_rows_none_and_one():
    assert sampling.sample_rows(SECRET, 0, 1000, 1.0).tolist() == list(range(1000))
    assert sampling.sample_rows(SECRET, 0, 1000, 1e-300).tolist() == []
    assert sampling.sample_rows(SECRET, 0, 1, 1.0, 1).tolist() == [0]
    assert sampling.sample_rows(SECRET, 0, 5, np.nextafter(1, 0)).tolist() == list(range(5))
    empty = sum(len(rows) == 0 for rows in samples(2000, 10, 0.1))
    assert stats.binomtest(empty, 2000, 0.9**10).pvalue > 1e-6


def test_indices_are_increasing_and_inside():
    for rows in samples(50, 1000, 0.2, 200):
        assert (
            rows.dtype == np.int64
            and (np.diff(rows) > 0).all()
            and rows[0] >= 0
            and rows[-1] < 1000
        )


def test_more_blocks_of_gaps_than_one(monkeypatch):
    """One block is almost always enough; three give no other law."""
    monkeypatch.setattr(sampling, "EXTRA", (-6.0, 0))
    sizes = [len(rows) for rows in samples(4000, 200, 0.5)]
    # Mean and variance of a binomial: z-tests at 1e-6.
    assert abs(np.mean(sizes) - 100) < stats.norm.isf(5e-7) * np.sqrt(50 / 4000)
    assert abs(np.var(sizes) / 50 - 1) < stats.norm.isf(5e-7) * np.sqrt(2 / 4000)


def test_ten_million_rows_take_little_time():
    """0.06 s for half a million drawn rows here; the limit leaves room for a busy machine."""
    start = time.perf_counter()
    rows = sampling.sample_rows(SECRET, 0, 10_000_000, 0.01)
    assert time.perf_counter() - start < 1
    assert abs(len(rows) - 100_000) < 6 * np.sqrt(99_000)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(count=0), "`count` must be 1 or more. Received: count=0"),
        (
            dict(probability=0.0),
            "`probability` must be above 0 and at most 1. Received: probability=0.0",
        ),
        (
            dict(probability=float("nan")),
            "`probability` must be above 0 and at most 1. Received: probability=nan",
        ),
        (dict(max_batch_size=0), "`max_batch_size` must be 1 or more. Received: max_batch_size=0"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError) as error:
        sampling.sample_rows(
            **{**dict(secret=SECRET, step=0, count=10, probability=0.5), **changes}
        )
    assert str(error.value) == message
