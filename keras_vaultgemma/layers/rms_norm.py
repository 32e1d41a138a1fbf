"""Root-mean-square normalisation."""

import keras
from keras import ops

from keras_vaultgemma import backend


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class RMSNorm(keras.layers.Layer):
    """Root-mean-square normalisation with Gemma's scale: `x / rms(x) * (1 + scale)`.

    It is computed in float32 and cast to the compute dtype at the end.
    `keras.layers.RMSNormalization` multiplies by `scale` alone, so a Gemma checkpoint would load
    into it and give wrong results.

    Args:
        epsilon: float. Added to the mean square. Defaults to 1e-6.
        stored_values: `StoredValues` of this layer. Not part of the config. Defaults to None, which
            initializes `scale` with zeros.

    Example:

    ```python
    import numpy as np
    from keras_vaultgemma.layers.rms_norm import RMSNorm

    x = RMSNorm()(np.array([[3.0, -4.0]], "float32"))
    ```
    """

    def __init__(self, epsilon=1e-6, stored_values=None, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self._stored_values = stored_values

    def build(self, input_shape):
        stored = self._stored_values
        self.scale = self.add_weight(
            shape=(input_shape[-1],),
            initializer="zeros" if stored is None else stored.initializer("scale"),
            name="scale",
        )

    def call(self, x):
        x = backend.rms_normalize(ops.cast(x, "float32"), self.epsilon)
        scale = 1.0 + ops.cast(backend.value_of(self.scale), "float32")
        if len(scale.shape) == 2:  # [U, D], one for each B / U consecutive rows of `x`
            rows = ops.reshape(x, (scale.shape[0], -1, x.shape[-1])) * scale[:, None]
            x = ops.reshape(rows, x.shape)
        else:
            x = x * scale
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}
