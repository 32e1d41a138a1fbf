"""The mechanism of DP-SGD: gradients of single rows are clipped, summed and noised (Abadi et al.).

Let g_i be the gradient of the loss of row i with respect to all trainable variables together. For
a batch of sampled rows, a step releases

    ( sum over the sampled rows i of  g_i * min(1, C / |g_i|)   +   N(0, (σ C)² I) ) / B

where B is the expected number of sampled rows, because the actual number is private. Every row is
one training record. All of it is computed in float32, whatever the model computes in.

**Users.** With `DPSGD(unit="user")` a record is a user: i runs over the sampled users, B is their
expected number, and g_i is the gradient of the mean loss of at most k of user i's rows. In all that
follows, read "user" for "row": g_i depends on nothing but the user's own rows and on random bits
that belong to this user and step (`privacy/groups.py`). For each value of these bits the step is
the one above, with the same bound C for all of the user's rows together, so that (ε, δ) holds for
each value and therefore on average over them.

**Sensitivity.** Replacing one record by a record without a gradient changes the sum by at most C in
the Euclidean norm, because only the term of this record changes. To make this hold in float32 as
well, rows are clipped to C (1 - `ROUNDING`) / (1 + ρ):

- `ROUNDING` covers the norm of a row and the product of gradient and factor. Squares are summed in
  stages of at most `STAGE` numbers, so that a norm is accurate to 4e-4.
- ρ (`sum_rounding`) covers the sum over rows, which may be rounded in opposite directions at every
  addition with the record and without it. The sum of more than about 250 rows is carried as a pair
  of float32 numbers, its rounded value and the rest of it, so that ρ is small for any number: 0.004
  for 250 rows, 0.008 for 65,536.

**Several devices** (`keras.distribution`, on JAX) each clip and sum their own rows, then add their
sums (`privacy/device_sums.py`). ρ covers these additions as well. The noise is a function of the
seeds and is added to the sum over all devices, so that it is drawn once: devices that hold the same
part of a variable compute the same numbers, others their part of one draw.

`clipped_sum` returns the sensitivity C together with the sum, and `noised_mean` scales the noise by
it; no other function decides how much noise is needed.

The noise is added to the pair before it is rounded (`privacy/noise.py`).

A row whose gradient or loss is not finite contributes nothing, like a row that was not sampled, and
is counted; so does a user, one of whose rows is such a row.

References:
    - [Abadi et al., 2016](https://arxiv.org/abs/1607.00133)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.privacy.noise import add_noise
from keras_vaultgemma.privacy.pairs import UNIT, add_pairs

ROUNDING = 2.0**-10
"""Fraction of the clipping norm that covers the rounding of a row's norm and clipped gradient."""

PLAIN_ROUNDING = 2.0**-8
"""Largest ρ of a plain sum; a sum of pairs takes longer and needs another buffer."""

STAGE = 2**12
"""Largest number of squares that are summed in one stage."""


class ClippedSum(NamedTuple):
    """Sums over the rows of a batch.

    Only `gradients` is protected by noise later on; `loss`, `clipped` and `not_finite` are not.

    Attributes:
        gradients: list of float32 tensors, one for each variable: the sum of the clipped gradients.
        sensitivity: float. Largest change of `gradients`, in the Euclidean norm over all variables
            together, if one record is replaced by a record without a gradient.
        loss: float32 scalar. Sum of the losses.
        clipped: float32 scalar. Number of rows whose gradient was longer than the clipping norm.
        not_finite: float32 scalar. Number of rows that were left out because their gradient or
            loss is not finite.
        rests: list of float32 tensors, or empty. What rounding to float32 removed from `gradients`;
            it enters the noised sum as well.
    """

    gradients: list
    sensitivity: float
    loss: Any
    clipped: Any
    not_finite: Any
    rests: Sequence = ()


def clipped_sum(
    row_gradients,
    shapes,
    count,
    rows,
    size,
    clip_norm,
    state,
    devices=1,
    last=None,
    static_lengths=False,
):
    """Return the sum of the clipped gradients of a batch, computed one microbatch at a time.

    With several devices it is the sum of one device's rows, and `device_sums` adds them.

    Args:
        row_gradients: function of `(start, length, state)` that computes that many rows of the
            batch, from `start` on. It returns `(gradients, losses, state)`: a list of tensors of
            shape `[length, *shape]`, one for each variable; a tensor of shape `[length]`; and the
            state for the next call.
        shapes: list of the shapes of the variables.
        count: int32 scalar. Number of rows of the batch, on this device.
        rows: int or int32 scalar. Largest number of rows of any batch, on all devices together. It
            is public, unlike `count`.
        size: int. Largest number of rows of a microbatch (`backend.loop_in_blocks`).
        clip_norm: float. C, above 0.
        state: list of tensors. State for the first call of `row_gradients`.
        devices: int. D, the number of devices that the rows are divided among. Defaults to 1.
        last: int32 scalar. Largest `count` of all devices, which then do the same number of
            microbatches, so that each finds the others it computes together with. Rows beyond
            `count` are computed and ignored. Defaults to `count`.
        static_lengths: bool, as for `backend.loop_in_blocks`. Defaults to False.

    Returns:
        Tuple `(ClippedSum, state)`.
    """
    in_pairs = needs_pairs(rows, size, devices)
    longest = clip_norm / (1 + sum_rounding(rows, size, devices))
    last = count if last is None else last

    def add_microbatch(start, length, sums):
        total, rest, statistics, state = sums
        gradients, losses, state = row_gradients(start, length, state)
        is_present = start + ops.arange(length, dtype="int32") < count
        gradients = [ops.cast(gradient, "float32") for gradient in gradients]
        factors, is_finite, norms = clip_factors(gradients, losses, is_present, longest)
        total, rest = list(total), list(rest)
        for i in range(len(total)):
            # Each gradient is dropped at once, to save its memory.
            scaled, gradients[i] = _scaled(gradients[i], factors), None
            if in_pairs:
                if not isinstance(length, int):
                    # Added by halves, whose number must be known. Zeros are added exactly.
                    zeros = ops.zeros((size - length, *shapes[i]))
                    scaled = ops.reshape(ops.concatenate([scaled, zeros]), (size, *shapes[i]))
                total[i], rest[i] = backend.in_blocks(_add_rows, [total[i], rest[i]], scaled)
            else:
                total[i] = backend.add_in_place(
                    total[i], scaled[0] if size == 1 else ops.sum(scaled, axis=0)
                )
        present, used = ops.cast(is_present, "float32"), ops.cast(is_finite, "float32")
        new = [
            ops.sum(ops.where(is_finite, losses, 0.0)),
            ops.sum(used * ops.cast(norms > clip_norm, "float32")),
            ops.sum(present - used),
        ]
        statistics = [old + update for old, update in zip(statistics, new, strict=True)]
        return total, rest, statistics, list(state)

    total = [backend.zeros(shape) for shape in shapes]
    rest = [backend.zeros(shape) for shape in shapes] if in_pairs else []
    statistics = [ops.zeros((), "float32") for _ in range(3)]
    total, rest, statistics, state = backend.loop_in_blocks(
        add_microbatch, last, size, (total, rest, statistics, list(state)), static_lengths
    )
    return ClippedSum(list(total), clip_norm, *statistics, list(rest)), list(state)


def needs_pairs(rows, size, devices=1):
    """Return True if a plain sum would be rounded by more than `PLAIN_ROUNDING`.

    Args:
        rows, size, devices: as in `sum_rounding`.
    """
    return not isinstance(rows, int) or _plain_rounding(rows, size, devices) > PLAIN_ROUNDING


def sum_rounding(rows, size, devices=1):
    """Return ρ: the increase of the sum's sensitivity by rounding, relative to the longest row c.

    Let n rows of norm c or less be summed in microbatches of m, and let u be `UNIT`.

    **A plain sum.** A term that goes through d additions enters the computed sum with a factor
    1 + δ in each coordinate, |δ| <= γ_d = d u / (1 - d u) (Higham, section 4.2). A row of the j-th
    of n / m microbatches goes through at most m - 1 additions within it, in whatever order, and
    n / m - j + 1 after it. Rows that whole microbatches leave over are added one by one or in
    smaller ones, which is at most m - 1 more additions for each row. The computed sum is off by at
    most the sum of γ_d c over the rows.

    **A sum of pairs.** `add_pairs` is exact up to 5 u^2 (|x| + |y|) in each coordinate. The rows of
    a microbatch are added by halves, on at most log2(n) levels, and the total of j rows is at most
    j c. In all, the pair is off by at most 8 u^2 n^2 c. Rounding the products of gradients and
    factors, or the total to one number, changes it by at most n u c.

    **Several devices** sum n / D rows each. In a plain sum, n / (D m) takes the place of n / m, and
    at most D - 1 additions follow, in whatever order the devices communicate.
    That is no more than on one device if each has two microbatches or more; ρ is the larger of both
    bounds, so that it rarely depends on D. The pairs of the devices are added one after the other.
    The k-th addition is off by 5 u^2 (k + 1) (n / D) c, the pair of each device by 8 u^2 (n / D)^2
    c, and D <= n, because a device without rows adds exact zeros. In all that is less than the
    above 8 u^2 n^2 c.

    The difference of two computed sums, with and without a record, is off by at most twice that.

    Args:
        rows: int or int32 scalar. n, the largest number of rows that are summed. The sum of a
            number that is not known when the step is compiled is one of pairs.
        size: int. m, the largest number of rows of a microbatch; there are n / m of them.
        devices: int. D. Defaults to 1.

    Returns:
        float or float32 scalar.

    References:
        - [Higham, 2002](https://doi.org/10.1137/1.9780898718027): Accuracy and Stability of
          Numerical Algorithms
    """
    if not needs_pairs(rows, size, devices):
        return _plain_rounding(rows, size, devices)
    rounded = ops.cast(rows, "float32") * UNIT
    return 2 * (rounded + 8 * rounded**2)


def _plain_rounding(rows, size, devices):
    return max(_plain_rounding_of(rows, size, number) for number in {1, devices})


def _plain_rounding_of(rows, size, devices):
    count = -(-rows // (size * devices))
    most = 2 * (size - 1) + devices - 1  # beside those of whole microbatches
    additions = devices * count * size * ((count + 1) / 2 + most)
    return 2 * UNIT * additions / (1 - UNIT * (count + most))


def clip_factors(gradients, losses, is_present, clip_norm):
    """Return the factor that clips the gradient of each row.

    Args:
        gradients: list of float32 tensors of shape `[R, ...]`, one for each variable: the gradients
            of R rows.
        losses: tensor of shape `[R]`.
        is_present: bool tensor of shape `[R]`. False for rows that only fill the microbatch.
        clip_norm: float. C.

    Returns:
        Tuple `(factors, is_finite, norms)` of tensors of shape `[R]`. `factors` is
        `min(1, C (1 - ROUNDING) / norm)`, or 0 for rows that are not present or not finite;
        `is_finite` is True for rows that are present and finite; `norms` are the Euclidean norms
        before clipping, over all variables together.
    """
    norms = ops.sqrt(sum(_squared_norms(gradient) for gradient in gradients))
    is_finite = ops.logical_and(
        is_present, ops.logical_and(ops.isfinite(norms), ops.isfinite(losses))
    )
    factors = clip_norm * (1 - ROUNDING) / ops.maximum(norms, clip_norm * (1 - ROUNDING))
    return ops.where(is_finite, factors, 0.0), is_finite, norms


def noised_mean(clipped, noise_multiplier, seeds, expected_rows, secure=False):
    """Return what a step releases: the noised sum, divided by the expected number of rows.

    Args:
        clipped: `ClippedSum`. Its tensors are used up: PyTorch writes over them.
        noise_multiplier: float. σ; the standard deviation of the noise is σ times the sensitivity
            of the sum.
        seeds: int32 tensor of shape `[n, 4]`. Seed of the noise of each of n variables, none of
            which may ever be used again.
        expected_rows: float. B.
        secure: bool, as for `noise.add_noise`. Defaults to `False`.

    Returns:
        List of float32 tensors, one for each variable.
    """
    deviation = noise_multiplier * clipped.sensitivity
    noised = []
    for i, total in enumerate(clipped.gradients):
        # In sequence and after the sum, because the noise of all variables at once would need the
        # memory of another gradient.
        seed = backend.schedule_after(seeds[i], noised[-1]) if noised else seeds[i]
        rest = clipped.rests[i] if clipped.rests else None
        noised.append(add_noise(total, rest, deviation, seed, secure) / expected_rows)
    return noised


def _add_rows(start, total, rest, rows):
    """Return the pair of a sum with the rows of a microbatch, of shape `[R, ...]`."""
    rests = ops.zeros_like(rows)
    while rows.shape[0] > 1:
        half = rows.shape[0] // 2
        if rows.shape[0] % 2:
            total, rest = add_pairs(total, rest, rows[-1], rests[-1])
        first, second = slice(half), slice(half, 2 * half)
        rows, rests = add_pairs(rows[first], rests[first], rows[second], rests[second])
    return add_pairs(total, rest, rows[0], rests[0])


def _squared_norms(x):
    """Return the sums of squares of `[R, ...]`, of shape `[R]`, summed in stages.

    One long chain of additions would lose the small terms.
    """
    sums = backend.sum_of_squares(_in_stages(x if len(x.shape) > 1 else x[:, None]))
    while len(sums.shape) > 1:
        sums = ops.sum(_in_stages(sums), axis=-1)
    return sums


def _in_stages(x):
    """Split the last axis in two if it is longer than `STAGE`, padding it with zeros."""
    if x.shape[-1] <= STAGE:
        return x
    x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, -x.shape[-1] % STAGE)])
    return ops.reshape(x, (*ops.shape(x)[:-1], -1, STAGE))


def _scaled(x, factors):
    """Return `factors[r] * x[r]`; a factor of 0 also cancels inf and NaN."""
    factors = ops.reshape(factors, (-1, *[1] * (len(x.shape) - 1)))
    return backend.multiply_no_nan(x, factors)
