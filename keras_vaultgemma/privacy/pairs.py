"""Sums of float32 tensors with twice the precision, as pairs of a rounded value and the rest of it.

Compilers must not reorder these sums. XLA does not, and PyTorch compiles nothing.

References:
    - [Knuth, The Art of Computer Programming, volume 2](https://www-cs-faculty.stanford.edu/~knuth/taocp.html)
    - [Joldes et al., 2017](https://doi.org/10.1145/3121432): bounds on the errors
"""

UNIT = 2.0**-24
"""Unit round-off u of float32: the largest relative error of one addition."""


def add_pairs(total, rest, x, x_rest):
    """Return the sum of two pairs of float32 tensors as a pair, whose rest rounds to 0 next to it.

    It is exact up to 5 u^2 (|total| + |x|), if each rest is at most u times its value: the error of
    `total + x` is exact, each of the three sums of small terms is rounded once, and none of them
    exceeds 2 u (|total| + |x|).
    """
    rounded, error = _two_sum(total, x)
    error = error + (rest + x_rest)
    total = rounded + error
    return total, error - (total - rounded)


def _two_sum(a, b):
    """Return `a + b`, rounded, and its exact error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
