"""A run is decided before it begins."""

import time

import pytest

from keras_vaultgemma.privacy import accounting, planning
from keras_vaultgemma.privacy.accounting import Steps

pytestmark = pytest.mark.any_backend


def test_a_budget_becomes_noise():
    steps = planning.plan(5000, 64, 3, 1e-5, epsilon=3.0, microbatch=8)
    assert steps[:3] == (3 * 79, 5000, 64 / 5000)
    assert 2.98 < accounting.epsilon([steps], 1e-5) <= 3.0
    assert steps.max_batch_size % 8 == 0


@pytest.mark.parametrize(
    "rows, batch_size, epochs, delta",
    [(100_000, 256, 3, 1e-6), (10_000_000, 1024, 10, 1e-9)],
    ids=["1,173 steps", "97,660 steps"],
)
def test_a_plan_takes_less_than_ten_seconds(rows, batch_size, epochs, delta):
    """Two calibrations and the head room between them, of which nothing was computed before."""
    accounting._one_step.cache_clear()
    before = time.process_time()
    steps = planning.plan(rows, batch_size, epochs, delta, epsilon=3.0, microbatch=8)
    assert time.process_time() - before < 10
    assert 2.98 < accounting.epsilon([steps], delta) <= 3.0


def test_noise_is_taken_as_it_is():
    steps = planning.plan(5000, 64, 3, 1e-5, noise_multiplier=1.1, microbatch=8)
    assert steps.noise_multiplier == 1.1


def test_earlier_runs_count_towards_the_budget():
    earlier = [Steps(50, 5000, 64 / 5000, 96, 1.0)]
    steps = planning.plan(5000, 64, 3, 1e-5, epsilon=3.0, earlier=earlier)
    assert 2.98 < accounting.epsilon([*earlier, steps], 1e-5) <= 3.0


@pytest.mark.parametrize("microbatch", [1, 8, 50])
def test_head_room_is_the_smallest_that_costs_one_percent(microbatch):
    steps = Steps(200, 5000, 64 / 5000, None, 0.9)
    room = planning.head_room(steps, 1e-5, microbatch)
    limit = 1.01 * accounting.epsilon([steps], 1e-5)
    assert room % microbatch == 0 and room >= 64
    assert accounting.epsilon([steps._replace(max_batch_size=room)], 1e-5) <= limit
    smaller = room - microbatch
    assert (
        smaller < 64 or accounting.epsilon([steps._replace(max_batch_size=smaller)], 1e-5) > limit
    )


def test_all_rows_need_no_head_room():
    """q = 1: every batch has all rows; the largest batch is the next multiple."""
    assert planning.head_room(Steps(3, 100, 1.0, None, 2.0), 1e-3, 7) == 105
    assert planning.head_room(Steps(3, 100, 1.0, None, 2.0), 1e-3, 1) == 100


def test_epochs_are_rounded_up():
    assert planning.steps_per_epoch(100, 32) == 4
    assert planning.steps_per_epoch(96, 32) == 3


def test_default_delta():
    assert planning.default_delta(1000) == pytest.approx(1000**-1.1)
    assert planning.default_delta(2) < 0.5
    with pytest.raises(
        ValueError, match="`rows` must be 2 or more for a default δ. Received: rows=1"
    ):
        planning.default_delta(1)


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
            dict(epsilon=1.0, microbatch=-1),
            "`microbatch` must be a positive integer. Received: microbatch=-1",
        ),
        (
            dict(epsilon=1.0, batch_size=101),
            "`batch_size` must be at most the 100 rows. Received: batch_size=101",
        ),
        (
            dict(noise_multiplier=0.0),
            "`noise_multiplier` must be above 0 and finite. Received: noise_multiplier=0.0",
        ),
    ],
)
def test_impossible_plans(changes, message):
    with pytest.raises(ValueError) as error:
        planning.plan(**{**dict(rows=100, batch_size=10, epochs=1, delta=1e-3), **changes})
    assert str(error.value).startswith(message)
