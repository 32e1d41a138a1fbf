"""Planning of a private run before it begins: its steps, its largest batch and its noise."""

import functools
import math
import warnings
from collections.abc import Sequence

from keras_vaultgemma._validation import check_exactly_one, check_integer, check_number
from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.accounting import LARGEST_EPSILON, SMALLEST_NOISE, Steps

TRUNCATION_COST = 0.01
"""Largest relative increase of ε that the truncation of large batches may cause."""

LARGEST_DEFAULT_DELTA = 1e-5

LARGEST_SHARE = 0.5
"""Largest N δ without a warning."""

PRECISION = 1e-3
"""Relative error of a calibrated noise multiplier."""


def plan(
    rows: int,
    batch_size: int,
    epochs: int,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    earlier: Sequence[Steps] = (),
    done: int = 0,
) -> Steps:
    """Return the steps of a run, with batches that may be larger than the expected batch size.

    Args:
        rows: int. N, the number of records in the data set.
        batch_size: int. Expected batch size; a record is in a batch with probability
            `batch_size / rows`.
        epochs: int. Number of times that a record takes part on average. An epoch has
            `rows / batch_size` steps, rounded up.
        delta: float in (0, 1).
        epsilon: float in (0, 100]. Budget of all steps. Exactly one of `epsilon` and
            `noise_multiplier` must be given.
        noise_multiplier: float. Standard deviation of the noise divided by the clipping norm.
        earlier: list of `Steps` that were done on the same data before and count towards
            `epsilon`. Defaults to none.
        done: int. Number of steps to leave out because an interrupted run has done them. Defaults
            to 0.

    Returns:
        `Steps`.

    Raises:
        ValueError: If an argument is out of range, or if `earlier` has used up the budget.
        ImportError: If batches are truncated and SciPy is not installed.

    Example:

    ```python
    from keras_vaultgemma.privacy import planning

    steps = planning.plan(rows=1000, batch_size=50, epochs=1, delta=1e-4, noise_multiplier=1.0)
    print(steps.count, steps.max_batch_size)
    ```
    """
    check_exactly_one(epsilon=epsilon, noise_multiplier=noise_multiplier)
    check_integer("rows", rows)
    check_integer("batch_size", batch_size)
    if batch_size > rows:
        raise ValueError(
            f"`batch_size` must be at most the number of rows, {rows}. "
            f"Received: batch_size={batch_size}"
        )
    check_integer("epochs", epochs)
    steps = Steps(
        epochs * steps_per_epoch(rows, batch_size) - done,
        rows,
        batch_size / rows,
        None,
        noise_multiplier,
    )
    if epsilon is None:
        return steps._replace(max_batch_size=choose_max_batch_size(steps, delta))
    steps = calibrate(steps, epsilon, delta, earlier)
    steps = steps._replace(max_batch_size=choose_max_batch_size(steps, delta))
    # Calibrate again, because the truncation needs a little more noise.
    return calibrate(steps, epsilon, delta, earlier)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the number of steps in which a record takes part once on average, rounded up."""
    return math.ceil(rows / batch_size)


def default_delta(rows: int) -> float:
    """Return δ = min(N^-1.1, `LARGEST_DEFAULT_DELTA`).

    It is below 1 / N, because a mechanism that publishes one random record satisfies δ = 1 / N.

    Args:
        rows: int, 2 or more. N, the number of records in the data set.

    Raises:
        ValueError: If `rows` is below 2.
    """
    check_integer("rows", rows, 2)
    return min(float(rows) ** -1.1, LARGEST_DEFAULT_DELTA)


def warn_of_large_delta(rows: int, delta: float) -> None:
    """Warn if N δ is above `LARGEST_SHARE`: δ then allows publishing that share of a record."""
    if rows * delta > LARGEST_SHARE:
        warnings.warn(
            f"`delta` should be far below 1 / N for N = {rows:,} records: a mechanism that "
            "publishes N δ records at random satisfies any ε at this δ. "
            f"Received: delta={delta:g}, N δ = {rows * delta:.2g}",
            stacklevel=2,
        )


def choose_max_batch_size(steps: Steps, delta: float) -> int:
    """Return the smallest Bmax whose truncation increases ε by 1 % at most.

    Args:
        steps: `Steps` with a noise multiplier. Its `max_batch_size` is ignored.
        delta: float in (0, 1).

    Returns:
        int. It may exceed the number of records, and then truncates nothing.
    """

    def costs_too_much(size):
        truncated = steps._replace(max_batch_size=size)
        return accounting.epsilon([truncated], delta) > limit

    limit = accounting.epsilon([steps._replace(max_batch_size=None)], delta) * (1 + TRUNCATION_COST)
    mean = steps.rows * steps.sampling_probability
    deviation = math.sqrt(mean * (1 - steps.sampling_probability))
    # Bracket the answer in strides of four standard deviations of the batch size, then bisect.
    too_small = math.ceil(mean) - 1
    stride = max(1, math.ceil(4 * deviation))
    enough = too_small + stride
    while costs_too_much(enough):
        too_small, enough = enough, enough + stride
    while enough - too_small > 1:
        middle = (enough + too_small) // 2
        too_small, enough = (middle, enough) if costs_too_much(middle) else (too_small, middle)
    return enough


def calibrate(steps: Steps, budget: float, delta: float, earlier: Sequence[Steps] = ()) -> Steps:
    """Return the same steps with the smallest noise that keeps within a budget.

    Args:
        steps: `Steps`. The search starts from its noise multiplier, or from 1 if it has none.
        budget: float in (0, 100]. Largest ε.
        delta: float in (0, 1).
        earlier: list of `Steps` that were done on the same data before and count towards the
            budget. Defaults to none.

    Returns:
        `Steps` whose ε, together with `earlier`, is at most `budget`. The noise multiplier is at
        most 0.1 % above the smallest possible one, and at least 0.01.

    Raises:
        ValueError: If an argument is out of range, or if `earlier` has used up the budget.
        ImportError: If batches are truncated and SciPy is not installed.

    Example:

    ```python
    from keras_vaultgemma.privacy import accounting, planning

    steps = accounting.Steps(count=10, rows=1000, sampling_probability=0.05)
    print(planning.calibrate(steps, budget=3.0, delta=1e-4).noise_multiplier)
    ```
    """
    check_number("epsilon", budget, above=0, maximum=LARGEST_EPSILON)
    accounting.check_delta(delta)
    check_integer("count", steps.count)
    if earlier and (used := accounting.epsilon(earlier, delta)) >= budget:
        raise ValueError(
            f"`epsilon` must be above {accounting.round_up(used)}, which earlier runs on the same "
            f"data have spent. Received: epsilon={budget}"
        )

    @functools.cache
    def excess(noise):
        """Return log(ε / budget), which is nearly linear in the logarithm of the noise."""
        value = accounting.epsilon([*earlier, steps._replace(noise_multiplier=noise)], delta)
        return math.log(max(value, 1e-300) / budget)

    low = high = steps.noise_multiplier or 1.0
    while excess(high) > 0:
        low, high = high, high * 2
        if high > 2**40:
            raise ValueError(
                f"`epsilon` must be larger: no noise keeps {steps} within it at delta={delta}, "
                f"together with earlier runs on the same data. Received: epsilon={budget}"
            )
    while low == high or excess(low) <= 0:
        if low <= SMALLEST_NOISE:
            return steps._replace(noise_multiplier=low)
        low, high = max(low / 2, SMALLEST_NOISE), low
    # Regula falsi in logarithms, or bisection if ε at `low` is infinite.
    while high > low * (1 + PRECISION):
        share = excess(low) / (excess(low) - excess(high)) if math.isfinite(excess(low)) else 0.5
        guess = low * (high / low) ** share
        # Stay half a precision inside, so that the next guess closes in from the other side.
        inside = math.sqrt(1 + PRECISION)
        guess = min(max(guess, low * inside), high / inside)
        low, high = (guess, high) if excess(guess) > 0 else (low, guess)
    return steps._replace(noise_multiplier=high)
