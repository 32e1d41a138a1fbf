"""Rotary position embedding.

References:
    - [Su et al., 2021](https://arxiv.org/abs/2104.09864), with half-split pairs as in GPT-NeoX
"""

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class RotaryAngles(keras.layers.Layer):
    """Cosines and sines of the rotation angles of each position.

    It is a layer without weights, because Keras marks the product of a symbolic tensor and a
    constant as sparse outside of a layer.

    Args:
        head_dim: int. Head width H, even.
        theta: float. Base of the wavelengths: channel pair i is rotated by
            `position * theta**(-2 * i / H)` radians.

    Example:

    ```python
    import numpy as np
    from keras_vaultgemma.layers.rotary import RotaryAngles, rotate

    cos, sin = RotaryAngles(head_dim=8, theta=10_000.0)(np.array([[0, 1, 2]]))
    x = rotate(np.ones((1, 3, 2, 8), "float32"), cos, sin)
    ```
    """

    def __init__(self, head_dim, theta, **kwargs):
        super().__init__(**kwargs)
        self.head_dim = head_dim
        self.theta = theta
        # By NumPy, so that all backends rotate by the same angles.
        exponents = -np.arange(0, head_dim, 2) / head_dim
        self.frequencies = (float(theta) ** exponents).astype("float32")

    def call(self, positions):
        """Compute the factors of `rotate`.

        Args:
            positions: int tensor [B, T].

        Returns:
            Tuple `(cos, sin)` of float32 tensors [B, T, 1, H]: (cos, cos) and (-sin, sin) of the
            angles. They stay float32, because bfloat16 represents integers up to 256 only.
        """
        # PyTorch would leave a multiplication by a NumPy array to NumPy.
        frequencies = ops.convert_to_tensor(self.frequencies)
        angles = ops.cast(positions, "float32")[:, :, None, None] * frequencies
        cos, sin = ops.cos(angles), ops.sin(angles)
        return ops.concatenate([cos, cos], axis=-1), ops.concatenate([-sin, sin], axis=-1)

    def get_config(self):
        return {**super().get_config(), "head_dim": self.head_dim, "theta": self.theta}


def rotate(x, cos, sin):
    """Rotate the channel pairs (i, i + H/2) of queries or keys.

    Args:
        x: float tensor [B, T, heads, H].
        cos, sin: float32 tensors [B, T, 1, H] from `RotaryAngles`.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    floats = ops.cast(x, "float32")
    return ops.cast(floats * cos + ops.roll(floats, x.shape[-1] // 2, axis=-1) * sin, x.dtype)
