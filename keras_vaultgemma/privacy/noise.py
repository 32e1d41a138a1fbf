"""The noise of a step: standard normal numbers from a seed of 128 bits, without a lattice.

**Why not a generator's own deviates.** Noise of which an observer knows that it has few possible
values hides nothing: subtract a candidate for the sum from what was released, and see if one of
them is left (Mironov). JAX's float32 deviates are 2^23 values, with gaps of 3e-4 beyond 3.5 and of
2e-3 beyond 4; TensorFlow's are alike, and neither reaches 6.

**Construction.** Two Box-Muller transforms of 64 uniform bits each give four independent deviates,

    r_i = sqrt(2 E_i),   E_i exponential,   t_i uniform in [-π, π),

and the noise of a coordinate is their weighted sum

    z = (r_1 cos t_1 + r_2 cos t_2) / sqrt(2)  +  2^-18 r_1 sin t_1  +  2^-36 r_2 sin t_2,

of variance 1 + 2^-36 + 2^-72 (Holohan and Braghin add deviates of equal weights). The first two
reach 9 standard deviations and have 2^96 combinations. The third is spread over many of the values
that their float32 sum can have, about 2^-24 apart, and the fourth over those of the third.
All are added to the pair of numbers that is the sum of the gradients (`mechanism`), and the result
is rounded to float32 once. Values of z are 2^-48 apart or less; a float32 number is finer than that
only below 2^-24 of the noise's standard deviation.

**Bits.** Threefry-4x32 with 20 rounds (Salmon et al.), keyed with the seed, counts coordinates. It
has passed all statistical tests, but nobody claims that it is cryptographic. With `DPSGD(secure=
True)` the bits are those of ChaCha20 (Bernstein, 2008; RFC 8439) with the seed as a key of 128
bits, a stream cipher: who tells them from random ones has broken it. It takes twice as many
operations.

**PyTorch's CPU** would compute this operation by operation. There, without `secure`, the deviates
are NumPy's float64 ones (the ziggurat on 64 bits of Philox-4x64, of the same authors). They are
2^-50 apart or less up to 8 standard deviations and are added to the pair in float64, which is
rounded to float32 once.

References:
    - [Mironov, 2012](https://doi.org/10.1145/2382196.2382264): attacks on floating-point noise
    - [Holohan and Braghin, 2021](https://arxiv.org/abs/2112.05307): noise as a sum of deviates
    - [Salmon et al., 2011](https://doi.org/10.1145/2063384.2063405): Threefry
    - [RFC 8439](https://www.rfc-editor.org/rfc/rfc8439): ChaCha20
"""

import math

from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.privacy.pairs import add_pairs

FINE, FINEST = 2.0**-18, 2.0**-36
"""Weights of the deviates that fill what lies between the values of the coarser ones."""

ROTATIONS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))
PARITY = 0x1BD11BDA
ROUNDS = 20

CHACHA_BLOCKS = 2**15
"""Blocks that are computed together: those of one block of `in_blocks` on PyTorch."""
CHACHA_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
CHACHA_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def add_noise(total, rest, deviation, seed, secure=False):
    """Return a sum with noise, rounded to float32 once.

    Args:
        total: float32 tensor. Its memory is used up.
        rest: float32 tensor like `total`, which is to be added to it, or None.
        deviation: float32 scalar. Standard deviation of the noise.
        seed: int32 tensor of shape `[4]`. It must never be used for another sum.
        secure: bool. If True, the bits come from ChaCha20. Defaults to `False`.

    Returns:
        float32 tensor like `total`.
    """
    rests = [] if rest is None else [rest]
    function = _add_secure_deviates if secure else _add_deviates
    (noised,) = backend.in_blocks(function, [total], *rests, seed=seed, deviation=deviation)
    return noised


def _add_deviates(start, total, rest=0.0, *, seed, deviation):
    exact = backend.add_float64_noise(start, total, rest, seed, deviation)
    if exact is not None:
        return (exact,)
    words = threefry([seed[i] for i in range(4)], [backend.positions(start, total.shape), 0, 0, 0])
    return _add_normal(words, total, rest, deviation)


def _add_secure_deviates(start, total, rest=0.0, *, seed, deviation):
    # Each block of ChaCha20 has 16 words, enough for four coordinates. `start` tells the blocks of
    # `in_blocks` apart.
    size = math.prod(total.shape)
    key = [seed[i] for i in range(4)] * 2

    def block(counter):
        return ops.stack(chacha20(key, [counter, start, 0, 0], b"expand 16-byte k"))

    counters = -(-size // 4)
    if counters <= CHACHA_BLOCKS:
        words = block(ops.arange(counters, dtype="int32"))
    else:
        # XLA would read and write memory in each round. In parts that stay in the cache this takes
        # a sixth of the time.
        parts = -(-counters // CHACHA_BLOCKS)
        counter = ops.arange(parts * CHACHA_BLOCKS, dtype="int32")
        words = ops.map(block, ops.reshape(counter, (parts, CHACHA_BLOCKS)))
        words = ops.reshape(ops.moveaxis(words, 1, 0), (16, -1))
    words = [ops.reshape(ops.reshape(words[i::4], (-1,))[:size], total.shape) for i in range(4)]
    return _add_normal(words, total, rest, deviation)


def _add_normal(words, total, rest, deviation):
    """Add deviates made from four int32 tensors of random bits."""
    (first, fine), (second, finest) = _box_muller(*words[:2]), _box_muller(*words[2:])
    coarse = (first + second) * math.sqrt(0.5)
    pair = add_pairs(total, rest, coarse * deviation, 0.0)
    return add_pairs(*pair, fine * (FINE * deviation), finest * (FINEST * deviation))[:1]


def threefry(key, counter):
    """Return 128 random bits for each counter.

    Args:
        key: list of 4 int32 tensors.
        counter: list of 4 int32 tensors or ints.

    Returns:
        List of 4 int32 tensors.
    """
    key = [*key, key[0] ^ key[1] ^ key[2] ^ key[3] ^ PARITY]
    x = [c + k for c, k in zip(counter, key[:4], strict=True)]
    for i in range(ROUNDS):
        # Even rounds mix the words 0 with 1 and 2 with 3, odd ones 0 with 3 and 2 with 1.
        for j, bits in zip((0, 2), ROTATIONS[i % 8], strict=True):
            k = (j + 1 + 2 * (i % 2)) % 4
            x[j] = x[j] + x[k]
            x[k] = backend.rotate_left(x[k], bits) ^ x[j]
        if i % 4 == 3:
            step = i // 4 + 1
            x = [word + key[(step + j) % 5] for j, word in enumerate(x)]
            x[3] = x[3] + step
    return x


def chacha20(key, counter, constants=b"expand 32-byte k"):
    """Return 512 random bits for each counter: blocks of ChaCha20.

    Args:
        key: list of 8 int32 tensors; 4 of them, twice, with the constants for keys of 128 bits.
        counter: list of 4 int32 tensors or ints: the words that RFC 8439 calls counter and nonce.
        constants: bytes of length 16. Defaults to those for keys of 256 bits.

    Returns:
        List of 16 int32 tensors.
    """
    constants = [int.from_bytes(constants[i : i + 4], "little") for i in range(0, 16, 4)]
    zeros = ops.zeros_like(sum(counter))
    start = [zeros + word for word in [*constants, *key, *counter]]
    # In a loop, because XLA takes seconds to compile 20 rounds one after the other.
    x = ops.fori_loop(0, ROUNDS // 2, _double_round, start)
    return [word + first for word, first in zip(x, start, strict=True)]


def _double_round(i, x):
    x = list(x)
    for a, b, c, d in CHACHA_COLUMNS + CHACHA_DIAGONALS:
        for bits_of_d, bits_of_b in ((16, 12), (8, 7)):
            x[a] = x[a] + x[b]
            x[d] = backend.rotate_left(x[d] ^ x[a], bits_of_d)
            x[c] = x[c] + x[d]
            x[b] = backend.rotate_left(x[b] ^ x[c], bits_of_b)
    return x


def _box_muller(bits, angle):
    """Return two independent standard normal deviates, float32, for two int32 tensors.

    A uniform number u in (0, 1) near 1 is represented by 1 - u, so that the radius, the square root
    of -2 log(u), has as many possible values near 0 as elsewhere.
    """
    # In (0, 1/2): u itself or 1 - u, according to the sign bit.
    part = (ops.cast(bits & 0x7FFFFFFF, "float32") + 0.5) * 2.0**-32
    radius = ops.sqrt(-2.0 * ops.where(bits < 0, ops.log(part), ops.log1p(-part)))
    angle = ops.cast(angle, "float32") * (math.pi * 2.0**-31)
    return radius * ops.cos(angle), radius * ops.sin(angle)
