"""Truncated Poisson sampling against the distributions it must follow, and the batches it makes.

The secret is fixed, so that a test always has the same result. Each statistical test states how often it would fail
for a random secret.
"""

import time

import keras
import numpy as np
import pytest
from scipy import stats

from keras_vaultgemma.privacy import sampling
from keras_vaultgemma.privacy.accounting import Steps
from keras_vaultgemma.privacy.sampling import PrivateBatches, as_rows, sample_rows
from keras_vaultgemma.privacy.seeds import layer_seed, new_secret, noise_seed
from keras_vaultgemma.training.batches import Batches

pytestmark = pytest.mark.any_backend

SECRET = bytes(range(16))


def samples(steps, *args):
    return [sample_rows(SECRET, step, *args) for step in range(steps)]


def test_every_row_is_drawn_with_probability_q():
    """χ² of the inclusion counts of 50 rows, and correlations of pairs: each fails once in 1e6 secrets."""
    steps, count, q = 20_000, 50, 0.13
    drawn = np.zeros((steps, count), bool)
    for step, rows in enumerate(samples(steps, count, q)):
        drawn[step, rows] = True
    counts = drawn.sum(axis=0)
    chi = ((counts - steps * q) ** 2 / (steps * q * (1 - q))).sum()
    assert stats.chi2.ppf(5e-7, count) < chi < stats.chi2.isf(5e-7, count)
    # Correlations of adjacent rows, which one geometric gap decides, and of the same row in two steps.
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        z = ((one - q) * (other - q)).sum() / (np.sqrt(one.size) * q * (1 - q))
        assert abs(z) < stats.norm.isf(5e-7)


@pytest.mark.parametrize("count, q", [(50, 0.13), (400, 0.01), (7, 0.9)])
def test_batch_sizes_are_binomial(count, q):
    """χ² over sizes that are expected ten times or more: it fails once in 1e6 secrets."""
    steps = 10_000
    sizes = np.bincount([len(rows) for rows in samples(steps, count, q)], minlength=count + 1)
    expected = steps * stats.binom.pmf(np.arange(count + 1), count, q)
    common = expected >= 10
    observed = np.append(sizes[common], sizes[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    chi = ((observed - expected) ** 2 / expected).sum()
    assert chi < stats.chi2.isf(1e-6, common.sum())


def test_large_samples_are_truncated_to_a_uniformly_random_subset():
    """Two-sided binomial test of the number of truncations, and χ² of the rows that remain, at 1e-6 each."""
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


def test_gaps_have_the_distribution_of_one_decision_for_each_row():
    """The numbers of rows in each of four quarters, against one Bernoulli draw of NumPy's for each row.

    Kolmogorov-Smirnov test of two samples at 1e-6."""
    rng = np.random.default_rng(3)
    slow = [np.flatnonzero(rng.random(1000) < 0.05) for _ in range(4000)]
    fast = samples(4000, 1000, 0.05)
    for quarter in range(4):
        counts = [[np.sum(rows // 250 == quarter) for rows in found] for found in (slow, fast)]
        assert stats.ks_2samp(*counts).pvalue > 1e-6


def test_samples_are_a_function_of_secret_and_step():
    """With the same secret, which only tests use again, the sample of each step is found in any order."""
    in_order = samples(20, 10_000, 0.01, 120)
    for step in (7, 19, 0):
        assert np.array_equal(sample_rows(SECRET, step, 10_000, 0.01, 120), in_order[step])
    assert len({rows.tobytes() for rows in in_order}) == 20
    other = sample_rows(new_secret(), 7, 10_000, 0.01, 120)
    assert not np.array_equal(other, in_order[7])


def test_extreme_probabilities():
    assert sample_rows(SECRET, 0, 1000, 1.0).tolist() == list(range(1000))
    assert sample_rows(SECRET, 0, 1000, 1e-300).tolist() == []
    assert sample_rows(SECRET, 0, 1, 1.0, 1).tolist() == [0]
    assert sample_rows(SECRET, 0, 5, np.nextafter(1, 0)).tolist() == list(range(5))
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


def test_several_blocks_of_gaps(monkeypatch):
    """One block is almost always enough; several of them give the same distribution."""
    monkeypatch.setattr(sampling, "EXTRA", (-6.0, 0))
    sizes = [len(rows) for rows in samples(4000, 200, 0.5)]
    # Mean and variance of a binomial: z-tests at 1e-6.
    assert abs(np.mean(sizes) - 100) < stats.norm.isf(5e-7) * np.sqrt(50 / 4000)
    assert abs(np.var(sizes) / 50 - 1) < stats.norm.isf(5e-7) * np.sqrt(2 / 4000)


def test_time_grows_with_the_drawn_rows_only():
    """As many rows of a data set 50 times as large take less than ten times as long."""

    def seconds(count, probability):
        start = time.process_time()
        for _ in range(5):
            sample_rows(SECRET, 0, count, probability)
        return time.process_time() - start

    assert seconds(10_000_000, 0.01) < 10 * seconds(200_000, 0.5)
    rows = sample_rows(SECRET, 0, 10_000_000, 0.01)
    assert abs(len(rows) - 100_000) < 6 * np.sqrt(99_000)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(count=0), "`count` must be a positive integer. Received: count=0"),
        (
            dict(probability=0.0),
            "`probability` must be a number above 0 and at most 1. Received: probability=0.0",
        ),
        (
            dict(probability=float("nan")),
            "`probability` must be a number above 0 and at most 1. Received: probability=nan",
        ),
        (
            dict(max_batch_size=0),
            "`max_batch_size` must be None or a positive integer. Received: max_batch_size=0",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError) as error:
        sample_rows(**{**dict(secret=SECRET, step=0, count=10, probability=0.5), **changes})
    assert str(error.value) == message


def batches(first_step=0, max_batch_size=12, **devices):
    x = {
        "token_ids": np.arange(1, 41)[:, None].repeat(3, 1),
        "padding_mask": np.ones((40, 3), "int32"),
    }
    rows = (x, np.arange(1, 41), np.full(40, 0.5, "float32"))
    steps = Steps(0, 40, 0.2, max_batch_size, 1.5)
    return PrivateBatches(rows, steps, 50, 2, SECRET, first_step, "aaaaaaaa:01", 3, **devices)


def test_a_batch_has_the_rows_of_its_step_padded_with_zeros():
    data = batches(first_step=7)
    assert len(data) == 50
    for i in range(50):
        x, y, step = data[i]
        drawn = sample_rows(SECRET, 7 + i, 40, 0.2, 12)
        assert step["count"].tolist() == [len(drawn)]
        assert y.tolist() == [*(drawn + 1), *[0] * (12 - len(drawn))]
        assert (x["token_ids"] == y[:, None]).all() and (
            x["padding_mask"] == (y > 0)[:, None]
        ).all()
        assert (step["sample_weight"] == 0.5 * (y > 0)).all()
        seeds = [noise_seed(SECRET, 7 + i, variable) for variable in (0, 1)]
        np.testing.assert_array_equal(step["noise_seeds"].view("uint32"), [seeds])
        seeds = [layer_seed(SECRET, 7 + i, layer) for layer in range(4)]
        np.testing.assert_array_equal(step["layer_seeds"], [seeds])
        assert step["noise_multiplier"] == [np.float32(1.5)] and step["expected_rows"] == [8]


def test_the_number_of_batches_may_change_when_a_run_resumes():
    assert (
        Batches(batches(), 1, False, 0).identity.items()
        >= {"rows": 40, "fingerprint": "aaaaaaaa:01"}.items()
    )
    assert "items" not in Batches(batches(), 1, False, 0).identity


def test_no_seed_of_a_run_is_used_twice():
    data = batches()
    assert len({seed.tobytes() for i in range(50) for seed in data[i][2]["noise_seeds"][0]}) == 100
    assert len({seed.tobytes() for i in range(50) for seed in data[i][2]["layer_seeds"][0]}) == 200


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_get_equal_parts_with_equal_noise_and_dropout_of_their_own(devices):
    alone, data = batches(), batches(devices=devices)
    assert data.capacity == 12
    for i in range(50):
        (_, rows, one), (x, y, step) = alone[i], data[i]
        parts = y.reshape(devices, -1)
        assert sorted(y) == sorted(rows) and (x["token_ids"] == y[:, None]).all()
        assert step["count"].tolist() == [(part > 0).sum() for part in parts]
        assert np.ptp(step["count"]) <= 1 and all(
            (np.diff(part > 0, prepend=True) == 0).sum() >= 0 for part in parts
        )
        assert (step["sample_weight"] == 0.5 * (y > 0)).all()
        for name in ("drawn", "noise_seeds", "noise_multiplier", "expected_rows"):
            np.testing.assert_array_equal(step[name], np.repeat(one[name], devices, axis=0))
        np.testing.assert_array_equal(step["layer_seeds"][:1], one["layer_seeds"])
        assert len({seed.tobytes() for part in step["layer_seeds"] for seed in part}) == 4 * devices


def test_a_process_gets_the_parts_of_its_devices():
    whole, own = batches(devices=4)[3], batches(devices=4, own_parts=[2, 3])[3]
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_array_equal(a[len(a) // 2 :], b), whole, own
    )


def test_a_batch_is_a_function_of_its_index():
    first, second = batches()[3], batches()[3]
    keras.tree.map_structure(np.testing.assert_array_equal, first, second)


def test_the_capacity_of_a_batch_is_at_most_all_rows():
    assert batches(max_batch_size=1000)[0][1].shape == (40,)


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"a": np.array([index, -index])}, np.array([1, 2])


def test_a_dataset_is_read_batch_by_batch():
    x, y = as_rows(Pairs())
    assert x["a"].tolist() == [0, 0, 1, -1, 2, -2] and y.tolist() == [1, 2] * 3


@pytest.mark.parametrize("data", [iter([1]), (i for i in [1]), "text"])
def test_data_without_rows_is_rejected(data):
    with pytest.raises(
        ValueError,
        match="draws its rows one by one: data must be strings, arrays or a `keras.utils.PyData",
    ):
        as_rows(data)


class Changing(keras.utils.PyDataset):
    """Rows that are shuffled or augmented anew whenever they are read."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.rng.normal(size=(4, 3)), np.ones((4, 2))


def test_a_dataset_whose_rows_change():
    with pytest.raises(
        ValueError, match="must have the same rows whenever .* batch 0, which differed"
    ):
        as_rows(Changing())
