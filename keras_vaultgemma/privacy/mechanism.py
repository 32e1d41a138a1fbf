"""The mechanism: gradients of single rows, clipped, summed and noised (Abadi et al., 2016, arXiv:1607.00133).

With g_i the gradient of row i's loss with respect to all trainable variables together, a step releases

    ( sum over the sampled rows i of  g_i * min(1, C / |g_i|)   +   N(0, (σ C)² I) ) / B

where B is the expected number of sampled rows, not the actual one, which is itself a secret. All of it is float32,
whatever the model computes in.

**Sensitivity.** Replacing one row by a row without a gradient changes the sum by at most C in the Euclidean norm, since
the row's own term is all that changes. In float32 as well, for rows are clipped to C (1 - `ROUNDING`) / (1 + ρ):
`ROUNDING` is for norms, which are summed up in stages of `STAGE` numbers at most and so right to 4e-4, and ρ
(`sum_rounding`) for the sum, which with the row and without it may be rounded in opposite directions at each addition:
1e-3 for 128 rows that are computed one by one, 0.06 for 1,000; 0.008 for 1,000 that are computed 8 at a time.
`clipped_sum` returns C with the sum, and `noised_mean` computes the noise from that; nothing else knows how much noise
is needed.

A row whose gradient is not finite contributes nothing, like a row that was not sampled, and is counted.
"""

from typing import NamedTuple

from keras import ops

from keras_vaultgemma import backend

ROUNDING = 2.0**-10
"""Part of the clipping norm that is left to the rounding of a row's norm and of its clipped gradient."""

UNIT = 2.0**-24
"""Largest relative error of one float32 addition."""

STAGE = 2**12
"""Numbers that are added up one after the other."""


class ClippedSum(NamedTuple):
    """Sums over the rows of a batch.

    Attributes:
        gradients: list of float32 tensors, one for each variable: the clipped gradients' sum.
        sensitivity: float, what replacing one row changes `gradients` by at most, in the norm over all of them.
        loss: float32 scalar, the losses' sum. This and what follows is not protected by any noise.
        clipped: float32 scalar, how many rows had a gradient longer than the clipping norm.
        not_finite: float32 scalar, how many rows had a gradient or loss that is not finite, and contributed nothing.
    """

    gradients: list
    sensitivity: float
    loss: object
    clipped: object
    not_finite: object


def clipped_sum(row_gradients, shapes, count, rows, size, clip_norm, state):
    """Sum of the clipped gradients of a batch, a microbatch at a time.

    Args:
        row_gradients: function of (start, state) that computes rows `start` to `start + size` of the batch and returns
            (gradients, losses, state): a list of [size, *shape] for each variable, [size], and what the next call gets.
        shapes: shape of each variable.
        count: int32 scalar, how many rows the batch has; what a microbatch has beyond them is computed and ignored.
        rows: int or int32 scalar, the most rows that a batch can have; public, as `count` is not.
        size: rows of a microbatch.
        clip_norm: C, above 0.
        state: list of tensors.

    Returns:
        `(ClippedSum, state)`.
    """
    longest = clip_norm / (1 + sum_rounding(rows, size))

    def add_microbatch(start, total, statistics, state):
        gradients, losses, state = row_gradients(start, state)
        is_present = start + ops.arange(size, dtype="int32") < count
        gradients = [ops.cast(gradient, "float32") for gradient in gradients]
        factors, is_finite, norms = clip_factors(gradients, losses, is_present, longest)
        total = list(total)
        for i in range(len(total)):
            # In the memory of the sum, and so that no second gradient stays alive.
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
    """ρ: what rounding may add to the sum's sensitivity, as a part of the rows' largest norm c.

    A term that goes through d additions is in the computed sum with a factor of 1 + δ in each coordinate, |δ| <= γ_d =
    d u / (1 - d u) with u = `UNIT` (Higham, 2002, section 4.2). So the computed sum is off by at most the sum of
    γ_d c over the rows, in the Euclidean norm, and the difference of two sums by twice that. Of n microbatches of m
    rows, a row in the j-th goes through m - 1 additions at most within it, in whatever order, and n - j + 1 after it.

    Args:
        rows: int or int32 scalar, how many rows are added up at most.
        size: m.

    Returns:
        float32 scalar.
    """
    n = ops.cast(-(-rows // size), "float32")
    additions = n * size * (size - 1 + (n + 1) / 2)
    return 2 * UNIT * additions / (1 - UNIT * (size - 1 + n))


def clip_factors(gradients, losses, is_present, clip_norm):
    """What each row's gradient is multiplied by.

    Args:
        gradients: list of float32 [R, ...], together the gradients of R rows.
        losses: [R].
        is_present: bool [R].
        clip_norm: C.

    Returns:
        `(factors, is_finite, norms)`, [R] each: `min(1, C (1 - ROUNDING) / norm)`, 0 for rows that are not present or
        not finite; whether a row is present and finite; the norms before clipping.
    """
    norms = ops.sqrt(sum(_squared_norms(gradient) for gradient in gradients))
    is_finite = ops.logical_and(
        is_present, ops.logical_and(ops.isfinite(norms), ops.isfinite(losses))
    )
    factors = clip_norm * (1 - ROUNDING) / ops.maximum(norms, clip_norm * (1 - ROUNDING))
    return ops.where(is_finite, factors, 0.0), is_finite, norms


def noised_mean(clipped, noise_multiplier, seeds, expected_rows):
    """What a step releases: the clipped sum plus Gaussian noise, over the expected number of rows.

    Args:
        clipped: `ClippedSum`.
        noise_multiplier: σ; the noise's standard deviation is σ times the sum's sensitivity.
        seeds: int32 [V, 4], the seed of each variable's noise, none of which is ever used again.
        expected_rows: B.

    Returns:
        List of float32 tensors, one for each variable.
    """
    deviation = noise_multiplier * clipped.sensitivity
    noised = []
    for i, gradient in enumerate(clipped.gradients):
        # One after the other, and after the sum: all noise at once would take the memory of another gradient.
        seed = backend.schedule_after(seeds[i], noised[-1] if noised else gradient)
        noised.append((gradient + deviation * backend.normal(seed, gradient.shape)) / expected_rows)
    return noised


def _squared_norms(x):
    """[R] sums of the squares of [R, ...], in stages: one long chain of additions would lose what is small."""
    x = _in_stages(x if len(x.shape) > 1 else x[:, None])
    # A product, for on TensorFlow and PyTorch all squares would be in memory together.
    sums = ops.einsum("...i,...i->...", x, x)
    while len(sums.shape) > 1:
        sums = ops.sum(_in_stages(sums), axis=-1)
    return sums


def _in_stages(x):
    """`x` with `STAGE` numbers at most along the last axis, which becomes two where there are more."""
    if x.shape[-1] <= STAGE:
        return x
    x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, -x.shape[-1] % STAGE)])
    return ops.reshape(x, (*x.shape[:-1], -1, STAGE))


def _weighted_sum(x, factors):
    """Sum over r of factors[r] x[r]; an x[r] whose factor is 0 has no part in it, though it were not finite."""
    factors = ops.reshape(factors, (-1, *[1] * (len(x.shape) - 1)))
    x = backend.multiply_no_nan(x, factors)
    return x[0] if x.shape[0] == 1 else ops.sum(x, axis=0)
