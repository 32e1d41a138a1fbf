"""What a private run will do, decided before it begins: steps, largest batch, noise."""

import math
import numbers

from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.accounting import Steps

HEAD_ROOM_COST = 0.01
"""Part of ε that cutting large batches off may cost."""


def plan(
    rows,
    batch_size,
    epochs,
    delta,
    epsilon=None,
    noise_multiplier=None,
    microbatch=1,
    earlier=(),
    done=0,
):
    """The steps of a run, with room for batches larger than the expected one.

    Args:
        rows: N, of the data set.
        batch_size: expected rows of a batch; each row is in a batch with probability `batch_size / rows`.
        epochs: how often a row takes part on average; an epoch has `rows / batch_size` steps, rounded up.
        delta: in (0, 1).
        epsilon: budget of all steps, in (0, 100]; or
        noise_multiplier: standard deviation of the noise over the clipping norm, above 0. Exactly one of the two.
        microbatch: rows that are computed at a time; the largest batch is a multiple of it.
        earlier: list of `Steps` already done on the same data, which count towards `epsilon`.
        done: steps of the epochs that are left out, since an interrupted run has done them.

    Returns:
        `Steps`.

    Raises:
        ValueError: for an argument outside its range.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError(
            "Exactly one of `epsilon` and `noise_multiplier` must be given. "
            f"Received: epsilon={epsilon}, noise_multiplier={noise_multiplier}"
        )
    for name, value in dict(
        rows=rows, batch_size=batch_size, epochs=epochs, microbatch=microbatch
    ).items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    if batch_size > rows:
        raise ValueError(
            f"`batch_size` must be at most the {rows} rows. Received: batch_size={batch_size}"
        )
    steps = Steps(
        epochs * steps_per_epoch(rows, batch_size) - done,
        rows,
        batch_size / rows,
        None,
        noise_multiplier,
    )
    if epsilon is None:
        return steps._replace(max_batch_size=head_room(steps, delta, microbatch))
    steps = accounting.calibrate(steps, epsilon, delta, earlier)
    steps = steps._replace(max_batch_size=head_room(steps, delta, microbatch))
    return accounting.calibrate(steps, epsilon, delta, earlier)


def steps_per_epoch(rows, batch_size):
    """Steps in which a row takes part once on average, rounded up."""
    return math.ceil(rows / batch_size)


def default_delta(rows):
    """N^-1.1: below 1 / N, which giving one row away would satisfy."""
    if rows < 2:
        raise ValueError(f"`rows` must be 2 or more for a default δ. Received: rows={rows}")
    return float(rows) ** -1.1


def head_room(steps, delta, microbatch):
    """The smallest largest batch, a multiple of `microbatch`, that costs at most 1 % more ε than none.

    Args:
        steps: `Steps` with a noise multiplier; its own largest batch is not read.
        delta: in (0, 1).
        microbatch: positive int.

    Returns:
        int; it may exceed the number of rows, and then never matters.
    """

    def costs_too_much(multiple):
        return (
            accounting.epsilon([steps._replace(max_batch_size=multiple * microbatch)], delta)
            > limit
        )

    limit = accounting.epsilon([steps._replace(max_batch_size=None)], delta) * (1 + HEAD_ROOM_COST)
    mean = steps.rows * steps.sampling_probability
    deviation = math.sqrt(mean * (1 - steps.sampling_probability))
    too_small, width = (
        math.ceil(mean / microbatch) - 1,
        max(1, math.ceil(4 * deviation / microbatch)),
    )
    enough = too_small + width
    while costs_too_much(enough):
        too_small, enough = enough, enough + width
    while enough - too_small > 1:
        middle = (enough + too_small) // 2
        too_small, enough = (middle, enough) if costs_too_much(middle) else (too_small, middle)
    return enough * microbatch
