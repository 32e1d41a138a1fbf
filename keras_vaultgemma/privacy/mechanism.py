"""The mechanism: gradients of single rows, clipped, summed and noised (Abadi et al., 2016, arXiv:1607.00133).

With g_i the gradient of row i's loss with respect to all trainable variables together, a step releases

    ( sum over the sampled rows i of  g_i * min(1, C / |g_i|)   +   N(0, (σ C)² I) ) / B

where B is the expected number of sampled rows, not the actual one, which is itself a secret. All of it is float32,
whatever the model computes in.

**Sensitivity.** Replacing one row by a row without a gradient changes the sum by at most C in the Euclidean norm, since
the row's own term is all that changes. In float32 as well: rows are clipped to C (1 - `ROUNDING`), and rounding adds
less than that. (A norm is summed up in stages of `STAGE` numbers at most, which leaves it right to 2e-4. Adding rows up
rounds by 2^-24 of what has been added: 1e-3 C in all for 180 rows that point the same way, or 30,000 that do not.)
`clipped_sum` returns C with the sum, and `noised_mean` computes the noise from that; nothing else knows how much noise
is needed.

A row whose gradient is not finite contributes nothing, like a row that was not sampled, and is counted.
"""

from typing import NamedTuple

from keras import ops

from keras_vaultgemma import backend

ROUNDING = 2.0**-10
"""Part of the clipping norm that is left to rounding."""

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


def clipped_sum(row_gradients, shapes, count, size, clip_norm, state):
    """Sum of the clipped gradients of a batch, a microbatch at a time.

    Args:
        row_gradients: function of (start, state) that computes rows `start` to `start + size` of the batch and returns
            (gradients, losses, state): a list of [size, *shape] for each variable, [size], and what the next call gets.
        shapes: shape of each variable.
        count: int32 scalar, how many rows the batch has; what a microbatch has beyond them is computed and ignored.
        size: rows of a microbatch.
        clip_norm: C, above 0.
        state: list of tensors.

    Returns:
        `(ClippedSum, state)`.
    """

    def add_microbatch(start, total, statistics, state):
        gradients, losses, state = row_gradients(start, state)
        is_present = start + ops.arange(size, dtype="int32") < count
        gradients = [ops.cast(gradient, "float32") for gradient in gradients]
        factors, is_finite, norms = clip_factors(gradients, losses, is_present, clip_norm)
        total = list(total)
        for i in range(len(total)):
            # In the memory of the sum, and so that no second gradient stays alive.
            total[i] = backend.add(total[i], _weighted_sum(gradients[i], factors))
            gradients[i] = None
        present, used = ops.cast(is_present, "float32"), ops.cast(is_finite, "float32")
        new = [
            ops.sum(ops.where(is_finite, losses, 0.0)),
            ops.sum(used * ops.cast(norms > clip_norm, "float32")),
            ops.sum(present - used),
        ]
        return start + size, total, [old + update for old, update in zip(statistics, new, strict=True)], list(state)

    zeros = [ops.zeros(shape, "float32") for shape in shapes]
    start, statistics = ops.zeros((), "int32"), [ops.zeros((), "float32") for _ in range(3)]
    _, total, statistics, state = backend.while_loop(
        lambda start, *_: start < count, add_microbatch, (start, zeros, statistics, list(state))
    )
    return ClippedSum(list(total), clip_norm, *statistics), list(state)


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
    is_finite = ops.logical_and(is_present, ops.logical_and(ops.isfinite(norms), ops.isfinite(losses)))
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
        seed = backend.after(seeds[i], noised[-1] if noised else gradient)
        noised.append((gradient + deviation * backend.normal(seed, gradient.shape)) / expected_rows)
    return noised


def _squared_norms(x):
    """[R] sums of the squares of [R, ...], in stages: one long chain of additions would lose what is small."""
    x = ops.square(x)
    while len(x.shape) > 1:
        if x.shape[-1] > STAGE:
            x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, -x.shape[-1] % STAGE)])
            x = ops.reshape(x, (*x.shape[:-1], -1, STAGE))
        x = ops.sum(x, axis=-1)
    return x


def _weighted_sum(x, factors):
    """Sum over r of factors[r] x[r]; an x[r] whose factor is 0 has no part in it, though it were not finite."""
    factors = ops.reshape(factors, (-1, *[1] * (len(x.shape) - 1)))
    x = ops.where(factors > 0, x, 0.0) * factors
    return x[0] if x.shape[0] == 1 else ops.sum(x, axis=0)
