"""Group privacy of rows, against closed forms and the accounting of single rows."""

import math

import pytest

from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.accounting import Steps
from keras_vaultgemma.privacy.group_privacy import group_epsilon

pytestmark = pytest.mark.any_backend

DELTA = 1e-5


@pytest.mark.parametrize(
    "steps", [Steps(100, 1000, 0.05, None, 1.0), Steps(20, 1000, 0.2, None, 3.0)]
)
def test_a_person_with_one_row_has_the_epsilon_of_a_row(steps):
    expected = accounting.epsilon([steps], DELTA)
    assert group_epsilon([steps], DELTA, 1) == pytest.approx(expected, rel=0.02)


def test_rows_that_always_take_part_are_one_row_of_their_joint_length():
    """k rows at noise σ are one of noise σ / k, also over several runs."""
    whole, runs = Steps(5, 10, 1.0, None, 4.0), [Steps(2, 10, 1.0, None, 16.0)] * 2
    expected = accounting.epsilon([Steps(4, 10, 1.0, None, 4.0)], DELTA)
    assert group_epsilon(runs, DELTA, 4) == pytest.approx(expected, rel=0.02)
    expected = accounting.epsilon([whole], DELTA)
    found = group_epsilon(
        [whole._replace(noise_multiplier=16.0), runs[0]._replace(count=0)], DELTA, 4
    )
    assert found == pytest.approx(expected, rel=0.02)


def test_it_is_far_below_the_textbook_bound_and_above_what_independent_rows_would_have():
    """(kε, δ (e^(kε) - 1) / (e^ε - 1)), at the ε of a row where that δ is the one asked for."""
    steps, k = Steps(100, 1000, 0.05, None, 1.0), 2
    found = group_epsilon([steps], DELTA, k)
    row = 4.0
    while accounting.delta([steps], row) * math.expm1(k * row) / math.expm1(row) > DELTA:
        row += 0.1
    assert accounting.epsilon([steps], DELTA) * 1.5 < found < 0.9 * k * row


@pytest.mark.parametrize("size", [3, 40])
def test_it_grows_with_the_rows_and_no_steps_cost_nothing(size):
    steps = Steps(10, 1000, 0.01, None, 2.0)
    assert group_epsilon([steps], DELTA, size) > 1.5 * group_epsilon([steps], DELTA, size // 2)
    assert group_epsilon([steps._replace(count=0)], DELTA, size) == 0


def test_what_is_rejected():
    steps = Steps(10, 1000, 0.01, None, 2.0)
    with pytest.raises(ValueError, match="`size` must be a positive integer. Received: size=0"):
        group_epsilon([steps], DELTA, 0)
    with pytest.raises(ValueError, match="`noise_multiplier`"):
        group_epsilon([steps._replace(noise_multiplier=None)], DELTA, 2)
