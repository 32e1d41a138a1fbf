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
has passed all statistical tests, but nobody claims that it is cryptographic.

**PyTorch's CPU** would compute this operation by operation. There, the deviates are NumPy's float64
ones (the ziggurat on 64 bits of Philox-4x64, of the same authors). They are 2^-50 apart or less up
to 8 standard deviations and are added to the pair in float64, which is rounded to float32 once.

References:
    - [Mironov, 2012](https://doi.org/10.1145/2382196.2382264): attacks on floating-point noise
    - [Holohan and Braghin, 2021](https://arxiv.org/abs/2112.05307): noise as a sum of deviates
    - [Salmon et al., 2011](https://doi.org/10.1145/2063384.2063405): Threefry
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


def add_noise(total, rest, deviation, seed):
    """Return a sum with noise, rounded to float32 once.

    Args:
        total: float32 tensor. Its memory is used up.
        rest: float32 tensor like `total`, which is to be added to it, or None.
        deviation: float32 scalar. Standard deviation of the noise.
        seed: int32 tensor of shape `[4]`. It must never be used for another sum.

    Returns:
        float32 tensor like `total`.
    """
    rests = [] if rest is None else [rest]
    (noised,) = backend.in_blocks(_add_deviates, [total], *rests, seed=seed, deviation=deviation)
    return noised


def _add_deviates(start, total, rest=0.0, *, seed, deviation):
    exact = backend.add_float64_noise(start, total, rest, seed, deviation)
    if exact is not None:
        return (exact,)
    words = threefry([seed[i] for i in range(4)], [backend.positions(start, total.shape), 0, 0, 0])
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
