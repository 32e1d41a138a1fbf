"""Planning: numbers of steps, largest batches and calibrated noise."""

import math
import time

import pytest

from keras_vaultgemma.privacy import accounting, planning, step_loss
from keras_vaultgemma.privacy.accounting import Steps

pytestmark = pytest.mark.any_backend


def test_a_budget_is_met_by_noise():
    steps = planning.plan(5000, 64, 3, 1e-5, epsilon=3.0)
    assert steps[:3] == (3 * 79, 5000, 64 / 5000)
    assert 2.98 < accounting.epsilon([steps], 1e-5) <= 3.0


@pytest.mark.parametrize(
    "rows, batch_size, epochs, delta",
    [(100_000, 256, 3, 1e-6), (10_000_000, 1024, 10, 1e-9)],
    ids=["1,173 steps", "97,660 steps"],
)
def test_a_plan_takes_less_than_ten_seconds(rows, batch_size, epochs, delta):
    """Two calibrations and the choice of the largest batch, without cached loss distributions."""
    step_loss.on_grid.cache_clear()
    before = time.process_time()
    steps = planning.plan(rows, batch_size, epochs, delta, epsilon=3.0)
    assert time.process_time() - before < 10
    assert 2.98 < accounting.epsilon([steps], delta) <= 3.0


def test_a_noise_multiplier_is_not_changed():
    steps = planning.plan(5000, 64, 3, 1e-5, noise_multiplier=1.1)
    assert steps.noise_multiplier == 1.1


def test_earlier_runs_count_towards_the_budget():
    earlier = [Steps(4, 200, 50 / 200, 80, 2.0)]
    steps = planning.plan(200, 50, 1, 1e-3, epsilon=3.0, earlier=earlier)
    assert 2.98 < accounting.epsilon([*earlier, steps], 1e-3) <= 3.0
    assert steps.noise_multiplier > planning.plan(200, 50, 1, 1e-3, epsilon=3.0).noise_multiplier


def test_steps_that_are_done_are_left_out():
    """A resumed run plans the rest of its epochs: three epochs of which two are done are one epoch."""
    rest = planning.plan(200, 50, 3, 1e-3, noise_multiplier=2.0, done=5)
    assert rest.count == 3 * 4 - 5
    for noise in (dict(noise_multiplier=2.0), dict(epsilon=3.0)):
        rest = planning.plan(200, 50, 3, 1e-3, **noise, done=8)
        assert rest == planning.plan(200, 50, 1, 1e-3, **noise)


def test_the_largest_batch_is_the_smallest_that_costs_one_percent():
    steps = Steps(200, 5000, 64 / 5000, None, 0.9)
    largest = planning.choose_max_batch_size(steps, 1e-5)
    limit = 1.01 * accounting.epsilon([steps], 1e-5)
    assert largest > 64
    assert accounting.epsilon([steps._replace(max_batch_size=largest)], 1e-5) <= limit
    assert accounting.epsilon([steps._replace(max_batch_size=largest - 1)], 1e-5) > limit


def test_the_largest_batch_of_all_records():
    """With q = 1 every batch has all records."""
    assert planning.choose_max_batch_size(Steps(3, 100, 1.0, None, 2.0), 1e-3) == 100


@pytest.mark.parametrize("budget", [0.1, 8.0])
@pytest.mark.parametrize("max_batch_size", [None, 300])
def test_calibration_uses_the_budget_and_keeps_within_it(budget, max_batch_size):
    steps = planning.calibrate(Steps(1000, 50_000, 256 / 50_000, max_batch_size), budget, 1e-5)
    assert accounting.epsilon([steps], 1e-5) <= budget
    less = steps._replace(noise_multiplier=steps.noise_multiplier / (1 + 1.01 * planning.PRECISION))
    assert accounting.epsilon([less], 1e-5) > budget
    assert steps._replace(noise_multiplier=None) == Steps(
        1000, 50_000, 256 / 50_000, max_batch_size
    )


def test_calibration_counts_earlier_runs():
    earlier = [Steps(100, 50_000, 256 / 50_000, 336, 1.0)]
    plan = Steps(500, 50_000, 256 / 50_000, 336)
    steps = planning.calibrate(plan, 2.0, 1e-5, earlier)
    assert 1.98 < accounting.epsilon([*earlier, steps], 1e-5) <= 2.0
    assert steps.noise_multiplier > planning.calibrate(plan, 2.0, 1e-5).noise_multiplier
    used = accounting.epsilon(earlier, 1e-5)
    with pytest.raises(
        ValueError, match=r"`epsilon` must be above .*, which earlier runs .* Received: epsilon=0.3"
    ):
        assert used > 0.3
        planning.calibrate(plan, 0.3, 1e-5, earlier)


def test_calibration_at_both_ends_of_the_range(monkeypatch):
    monkeypatch.setattr(planning, "SMALLEST_NOISE", 0.3)
    assert planning.calibrate(Steps(1, 10, 0.1), 20.0, 0.5).noise_multiplier == 0.3
    steps = planning.calibrate(Steps(10, 100_000, 0.01), 1e-3, 1e-5)
    assert accounting.epsilon([steps], 1e-5) <= 1e-3


def test_calibration_of_impossible_budgets():
    for budget in (0.0, -1.0, 101.0, math.nan):
        with pytest.raises(
            ValueError,
            match="`epsilon` must be a number above 0 and at most 100. Received: epsilon=",
        ):
            planning.calibrate(Steps(10, 100, 0.1), budget, 1e-5)
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(
            ValueError, match="`delta` must be a number above 0 and below 1. Received: delta="
        ):
            planning.calibrate(Steps(10, 100, 0.1), 1.0, delta)
    with pytest.raises(ValueError, match="`count` must be a positive integer. Received: count=0"):
        planning.calibrate(Steps(0, 100, 0.1), 1.0, 1e-5)


def test_epochs_are_rounded_up():
    assert planning.steps_per_epoch(100, 32) == 4
    assert planning.steps_per_epoch(96, 32) == 3


def test_default_delta():
    assert planning.default_delta(10**6) == pytest.approx(10**-6.6)
    assert planning.default_delta(180) == planning.default_delta(2) == 1e-5
    with pytest.raises(
        ValueError, match="`rows` must be an integer of at least 2. Received: rows=1"
    ):
        planning.default_delta(1)


def test_a_delta_that_allows_publishing_a_record():
    with pytest.warns(UserWarning, match="`delta` should be far below 1 / N for N = 180 records"):
        planning.warn_of_large_delta(180, 0.0033)
    planning.warn_of_large_delta(180, 1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(),
            "Exactly one of `epsilon` and `noise_multiplier` must be given. Received: epsilon=None, noise_mult",
        ),
        (
            dict(epsilon=1.0, noise_multiplier=1.0),
            "Exactly one of `epsilon` and `noise_multiplier` must be given. Rec",
        ),
        (dict(epsilon=1.0, rows=0), "`rows` must be a positive integer. Received: rows=0"),
        (
            dict(epsilon=1.0, batch_size=2.5),
            "`batch_size` must be a positive integer. Received: batch_size=2.5",
        ),
        (
            dict(epsilon=1.0, epochs=True),
            "`epochs` must be a positive integer. Received: epochs=True",
        ),
        (
            dict(epsilon=1.0, batch_size=101),
            "`batch_size` must be at most the number of rows, 100. Received: batch_size=101",
        ),
        (
            dict(noise_multiplier=0.0),
            "`noise_multiplier` must be a finite number of at least 0.01. Received: noise_multiplier=0.0",
        ),
    ],
)
def test_impossible_plans(changes, message):
    with pytest.raises(ValueError) as error:
        planning.plan(**{**dict(rows=100, batch_size=10, epochs=1, delta=1e-3), **changes})
    assert str(error.value).startswith(message)
