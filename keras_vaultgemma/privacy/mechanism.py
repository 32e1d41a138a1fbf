"""The mechanism of DP-SGD: gradients of single rows are clipped, summed and noised (Abadi et al.).

Let g_i be the gradient of the loss of row i with respect to all trainable variables together. For
a batch of sampled rows, a step releases

    ( sum over the sampled rows i of  g_i * min(1, C / |g_i|)   +   N(0, (σ C)² I) ) / B

where B is the expected number of sampled rows, because the actual number is private. Every row is
one training record. All of it is computed in float32, whatever the model computes in.

**Sensitivity.** Replacing one record by a record without a gradient changes the sum by at most C in
the Euclidean norm, because only the term of this record changes. To make this hold in float32 as
well, rows are clipped to C (1 - `ROUNDING`) / (1 + ρ):

- `ROUNDING` covers the norm of a row and the product of gradient and factor. Squares are summed in
  stages of at most `STAGE` numbers, so that a norm is accurate to 4e-4.
- ρ (`sum_rounding`) covers the sum over rows, which may be rounded in opposite directions at every
  addition with the record and without it. It is 1e-3 for 128 rows that are computed one by one,
  0.06 for 1,000 rows, and 0.008 for 1,000 rows that are computed 8 at a time.

`clipped_sum` returns the sensitivity C together with the sum, and `noised_mean` scales the noise by
it; no other function decides how much noise is needed.

A row whose gradient or loss is not finite contributes nothing, like a row that was not sampled, and
is counted.

References:
    - [Abadi et al., 2016](https://arxiv.org/abs/1607.00133)
"""

from typing import Any, NamedTuple

from keras import ops

from keras_vaultgemma import backend

ROUNDING = 2.0**-10
"""Fraction of the clipping norm that covers the rounding of a row's norm and clipped gradient."""

UNIT = 2.0**-24
"""Unit round-off u of float32: the largest relative error of one addition."""

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
    """

    gradients: list
    sensitivity: float
    loss: Any
    clipped: Any
    not_finite: Any


def clipped_sum(row_gradients, shapes, count, rows, size, clip_norm, state):
    """Return the sum of the clipped gradients of a batch, computed one microbatch at a time.

    Args:
        row_gradients: function of `(start, state)` that computes the rows `start` to `start + size`
            of the batch. It returns `(gradients, losses, state)`: a list of tensors of shape
            `[size, *shape]`, one for each variable; a tensor of shape `[size]`; and the state for
            the next call.
        shapes: list of the shapes of the variables.
        count: int32 scalar. Number of rows of the batch. Rows beyond it, which fill the last
            microbatch, are computed and ignored.
        rows: int or int32 scalar. Largest number of rows of any batch. It is public, unlike
            `count`.
        size: int. Number of rows of a microbatch.
        clip_norm: float. C, above 0.
        state: list of tensors. State for the first call of `row_gradients`.

    Returns:
        Tuple `(ClippedSum, state)`.
    """
    longest = clip_norm / (1 + sum_rounding(rows, size))

    def add_microbatch(start, total, statistics, state):
        gradients, losses, state = row_gradients(start, state)
        is_present = start + ops.arange(size, dtype="int32") < count
        gradients = [ops.cast(gradient, "float32") for gradient in gradients]
        factors, is_finite, norms = clip_factors(gradients, losses, is_present, longest)
        total = list(total)
        for i in range(len(total)):
            # Added in place, and each gradient is dropped at once, to save the memory of a copy.
            total[i] = backend.add_in_place(total[i], _weighted_sum(gradients[i], factors))
            gradients[i] = None
        present, used = ops.cast(is_present, "float32"), ops.cast(is_finite, "float32")
        new = [
            ops.sum(ops.where(is_finite, losses, 0.0)),
            ops.sum(used * ops.cast(norms > clip_norm, "float32")),
            ops.sum(present - used),
        ]
        return (
            start + size,
            total,
            [old + update for old, update in zip(statistics, new, strict=True)],
            list(state),
        )

    zeros = [backend.zeros(shape) for shape in shapes]
    start, statistics = ops.zeros((), "int32"), [ops.zeros((), "float32") for _ in range(3)]
    _, total, statistics, state = backend.while_loop(
        lambda start, *_: start < count, add_microbatch, (start, zeros, statistics, list(state))
    )
    return ClippedSum(list(total), clip_norm, *statistics), list(state)


def sum_rounding(rows, size):
    """Return ρ: the increase of the sum's sensitivity by rounding, relative to the longest row c.

    A term that goes through d additions enters the computed sum with a factor 1 + δ in each
    coordinate, |δ| <= γ_d = d u / (1 - d u), with u = `UNIT` (Higham, section 4.2). The Euclidean
    error of the computed sum is therefore at most the sum of γ_d c over the rows, and the
    difference of two computed sums is off by at most twice that. With n microbatches of m rows, a
    row of the j-th microbatch goes through at most m - 1 additions within it, in whatever order,
    and n - j + 1 additions after it.

    Args:
        rows: int or int32 scalar. Largest number of rows that are summed.
        size: int. m, the number of rows of a microbatch.

    Returns:
        float32 scalar.

    References:
        - [Higham, 2002](https://doi.org/10.1137/1.9780898718027): Accuracy and Stability of
          Numerical Algorithms
    """
    n = ops.cast(-(-rows // size), "float32")
    additions = n * size * (size - 1 + (n + 1) / 2)
    return 2 * UNIT * additions / (1 - UNIT * (size - 1 + n))


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


def noised_mean(clipped, noise_multiplier, seeds, expected_rows):
    """Return what a step releases: the noised sum, divided by the expected number of rows.

    Args:
        clipped: `ClippedSum`.
        noise_multiplier: float. σ; the standard deviation of the noise is σ times the sensitivity
            of the sum.
        seeds: int32 tensor of shape `[n, 4]`. Seed of the noise of each of n variables, none of
            which may ever be used again.
        expected_rows: float. B.

    Returns:
        List of float32 tensors, one for each variable.
    """
    deviation = noise_multiplier * clipped.sensitivity
    noised = []
    for i, gradient in enumerate(clipped.gradients):
        # In sequence and after the sum, because the noise of all variables at once would need the
        # memory of another gradient.
        seed = backend.schedule_after(seeds[i], noised[-1] if noised else gradient)
        noised.append((gradient + deviation * backend.normal(seed, gradient.shape)) / expected_rows)
    return noised


def _squared_norms(x):
    """Return the sums of squares of `[R, ...]`, of shape `[R]`, summed in stages.

    One long chain of additions would lose the small terms.
    """
    x = _in_stages(x if len(x.shape) > 1 else x[:, None])
    # einsum, because TensorFlow and PyTorch would materialise the squares.
    sums = ops.einsum("...i,...i->...", x, x)
    while len(sums.shape) > 1:
        sums = ops.sum(_in_stages(sums), axis=-1)
    return sums


def _in_stages(x):
    """Split the last axis in two if it is longer than `STAGE`, padding it with zeros."""
    if x.shape[-1] <= STAGE:
        return x
    x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, -x.shape[-1] % STAGE)])
    return ops.reshape(x, (*x.shape[:-1], -1, STAGE))


def _weighted_sum(x, factors):
    """Return the sum over r of `factors[r] * x[r]`; a factor of 0 also cancels inf and NaN."""
    factors = ops.reshape(factors, (-1, *[1] * (len(x.shape) - 1)))
    x = backend.multiply_no_nan(x, factors)
    return x[0] if x.shape[0] == 1 else ops.sum(x, axis=0)
