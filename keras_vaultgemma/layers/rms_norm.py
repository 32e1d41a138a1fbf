"""TODO."""

import keras
from keras import ops


class RMSNorm(keras.layers.Layer):
    """Root-mean-square normalisation as Gemma scales it: `x / rms(x) * (1 + scale)`, in float32, cast back at the end.

    `keras.layers.RMSNormalization` multiplies by `scale` alone, so a Gemma checkpoint would load and be wrong.

    Args:
        epsilon: added to the mean square.
        initial: `Initial` of this layer, or None to start at scale 0.
    """

    def __init__(self, epsilon=1e-6, initial=None, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.initial = initial

    def build(self, input_shape):
        initializer = "zeros" if self.initial is None else self.initial("scale", random="zeros")
        self.scale = self.add_weight(
            shape=(input_shape[-1],), initializer=initializer, name="scale"
        )

    def call(self, x):
        x = ops.cast(x, "float32")
        x = x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + self.epsilon)
        return ops.cast(x * (1.0 + ops.cast(self.scale, "float32")), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
