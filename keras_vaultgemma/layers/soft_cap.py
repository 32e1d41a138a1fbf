"""TODO."""

from keras import ops


def soft_cap(x, cap):
    """`cap * tanh(x / cap)`, which keeps x within (-cap, cap) (Gemma 2 report, section 2); x itself if cap is None."""
    return x if cap is None else cap * ops.tanh(x / cap)
