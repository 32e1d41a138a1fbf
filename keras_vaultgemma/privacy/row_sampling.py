"""Truncated Poisson sampling: the rows of a step.

Each row is drawn independently with probability q; of more than Bmax rows a uniformly random subset of Bmax remains; no
rows is a sample as well, and its step is done like any other. This is the sampling that `accounting` accounts for
(Abadi et al., 2016, arXiv:1607.00133; Chua et al., 2024, arXiv:2411.04205, for the truncation). Batches of a fixed
size, or epochs over shuffled rows, are not: their ε is larger than what Poisson sampling's says.

Amplification by sampling holds because nobody knows who was drawn, so the random bits are cryptographic ones: SHAKE-256
(FIPS 202), keyed with 256 bits that HMAC-SHA256 derives from the run's secret, the step and a counter.
"""

import hashlib

import numpy as np

from keras_vaultgemma.privacy import secret_key

EXTRA = (6.0, 16)
"""Gaps that are drawn at once beyond the expected number: deviations, and a constant. They are rarely too few; then
another block follows."""


def rows(secret, step, count, probability, max_batch_size=None):
    """Indices of the rows of one step; the same for the same arguments.

    The gap between two drawn rows is geometric, P(gap >= g) = (1 - q)^g. That is equivalent in law to a decision for
    each row, and takes a random number for each drawn row instead. A gap is computed in float64 from 53 random bits, so
    that P(gap >= g) is right to an absolute 2^-53 and a relative 1e-15 (1 + g q): for ten million rows and q of 1e-7 or
    more, a row's probability is q to within one part in 1e8.

    Args:
        secret: 16 bytes, as `secret_key.new` returns them; of one call of `fit`, in which no step comes twice.
        step: int, 0 or more.
        count: N, the number of rows, 1 or more.
        probability: q, in (0, 1].
        max_batch_size: Bmax, 1 or more; None for no truncation.

    Returns:
        int64 [n], increasing, of numbers from 0 to `count` - 1; n may be 0.

    Raises:
        ValueError: for an argument outside its range.
    """
    if count < 1:
        raise ValueError(f"`count` must be 1 or more. Received: count={count}")
    if not 0 < probability <= 1:
        raise ValueError(f"`probability` must be above 0 and at most 1. Received: probability={probability}")
    if max_batch_size is not None and max_batch_size < 1:
        raise ValueError(f"`max_batch_size` must be 1 or more. Received: max_batch_size={max_batch_size}")
    drawn = _poisson(secret, step, count, probability)
    if max_batch_size is None or len(drawn) <= max_batch_size:
        return drawn
    # The rows with the smallest of independent 64-bit numbers are a uniformly random subset.
    keys = _random_bits(secret, "truncation", step, 0, len(drawn))
    return np.sort(drawn[np.argsort(keys, kind="stable")[:max_batch_size]])


def _poisson(secret, step, count, probability):
    expected = count * probability
    size = max(1, int(expected + EXTRA[0] * expected**0.5) + EXTRA[1])
    with np.errstate(divide="ignore"):
        log_left_out = np.log1p(-probability)
    found, last, block = [], -1, 0
    while last < count:
        bits = _random_bits(secret, "sampling", step, block, size)
        # In (0, 1], multiples of 2^-53: the logarithm is finite.
        uniform = ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
        # A gap beyond the last row ends the sample, however large; as a sum it must not overflow.
        gaps = np.minimum(np.log(uniform) / log_left_out, count).astype("int64")
        found.append(last + np.cumsum(gaps + 1))
        last, block = int(found[-1][-1]), block + 1
    drawn = np.concatenate(found)
    return drawn[: np.searchsorted(drawn, count)]


def _random_bits(secret, purpose, step, block, size):
    """uint64 [size], independent and uniform."""
    key = secret_key.derive(secret, purpose, step, block)
    return np.frombuffer(hashlib.shake_256(key).digest(8 * size), "<u8")
