"""TODO."""

import keras
import numpy as np
from keras import ops


class RotaryAngles(keras.layers.Layer):
    """Positions to the angles of the rotary embedding (Su et al., 2021, arXiv:2104.09864; half-split as in GPT-NeoX).

    A layer, though it owns no weight: Keras marks the product of a symbolic tensor and a constant as sparse.

    Args:
        head_dim: H, even.
        theta: channel pair i turns by position * theta^(-2i/H).
    """

    def __init__(self, head_dim, theta, **kwargs):
        super().__init__(**kwargs)
        # Constants from NumPy, so that every backend turns by the same angles.
        self.frequencies = (float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)).astype(
            "float32"
        )

    def call(self, positions):
        """What `rotate` multiplies by, for int positions [B, T].

        Returns:
            (cos, cos) and (-sin, sin) of the angles, [B, T, 1, H] each: float32, since bfloat16 ends at position 256.
        """
        # Not times the NumPy array: PyTorch would leave the multiplication to NumPy, unseen by `backend.compile_step`.
        frequencies = ops.convert_to_tensor(self.frequencies)
        angles = ops.cast(positions, "float32")[:, :, None, None] * frequencies
        cos, sin = ops.cos(angles), ops.sin(angles)
        return ops.concatenate([cos, cos], axis=-1), ops.concatenate([-sin, sin], axis=-1)


def rotate(x, cos, sin):
    """Rotate channel pairs (i, i + H/2) of `x` [B, T, heads, H] by `RotaryAngles`; same shape and dtype."""
    floats = ops.cast(x, "float32")
    return ops.cast(floats * cos + ops.roll(floats, x.shape[-1] // 2, axis=-1) * sin, x.dtype)
