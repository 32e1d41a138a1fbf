"""Soft cap of attention scores and logits."""

from keras import ops


def soft_cap(x, cap):
    """Return `cap * tanh(x / cap)`, which lies in (-cap, cap), or `x` if `cap` is None.

    References:
        - [Gemma 2, 2024, section 2](https://arxiv.org/abs/2408.00118)
    """
    return x if cap is None else cap * ops.tanh(x / cap)
