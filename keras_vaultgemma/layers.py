"""Rotary positions, the soft cap, RMS normalisation and the one kind of projection."""

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend


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
        self.frequencies = (float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)).astype("float32")

    def call(self, positions):
        """(cos, sin), [B, T, 1, H/2] each, for int positions [B, T]: float32, since bfloat16 ends at position 256."""
        angles = ops.cast(positions, "float32")[:, :, None, None] * self.frequencies
        return ops.cos(angles), ops.sin(angles)


def rotate(x, cos, sin):
    """Rotate channel pairs (i, i + H/2) of `x` [B, T, heads, H] by `RotaryAngles`; same shape and dtype."""
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    rotated = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(rotated, x.dtype)


def soft_cap(x, cap):
    """`cap * tanh(x / cap)`, which keeps x within (-cap, cap) (Gemma 2 report, section 2); x itself if cap is None."""
    return x if cap is None else cap * ops.tanh(x / cap)


class Initial:
    """Where a layer's variables start: random, or at stored values.

    Args:
        initializer_range: standard deviation of random values.
        values: `{variable path: value with read(dtype)}`, or None for random ones; each is taken out once it was read.
        path: of the layer, to which names of variables are appended.
    """

    def __init__(self, initializer_range, values=None, path=""):
        self.initializer_range, self.values, self.path = initializer_range, values, path

    def below(self, name):
        """The same for the variables of a sublayer."""
        return Initial(self.initializer_range, self.values, f"{self.path}{name}/")

    def __call__(self, name, random=None):
        """A Keras initializer for the variable `name`; `random` replaces the normal distribution."""
        if self.values is not None:

            def stored(shape, dtype, layout=None):
                return backend.from_numpy(self._stored(self.path + name, tuple(shape)).read(dtype), layout)

            return stored
        # A new initializer each time: one instance would give two matrices of a shape the same values.
        return random or keras.initializers.RandomNormal(stddev=self.initializer_range)

    def _stored(self, path, shape):
        value = self.values.pop(path, None)
        if value is None or tuple(value.shape) != shape:
            found = None if value is None else tuple(value.shape)
            raise ValueError(f"The value of {path} must have the shape {shape}. Received: {found}")
        return value


def projection(units, name, initial, dtype):
    """A matrix [in, units] without bias; all projections are such, so that LoRA and int8 meet plain matrices."""
    initializer = initial.below(name)("kernel")
    return Projection(units, use_bias=False, kernel_initializer=initializer, dtype=dtype, name=name)


class Projection(keras.layers.Dense):
    """A `keras.layers.Dense` without bias whose product is `backend.matmul`."""

    def call(self, x, training=None):
        return backend.matmul(x, ops.convert_to_tensor(self.kernel))

    def quantize(self, mode=None, type_check=True, config=None):
        # Keras quantises subclasses only where they say so.
        super().quantize(mode, type_check=False, config=config)

    def quantized_call(self, x, training=None):
        if self.quantization_mode != "int8" or self.inputs_quantizer is None or training or self.lora_enabled:
            return super().quantized_call(x, training=training)
        x, x_scale = self.inputs_quantizer(x, axis=-1)
        product = ops.cast(backend.int8_matmul(x, ops.convert_to_tensor(self.kernel)), "float32")
        return ops.cast(product / (x_scale * self.kernel_scale), self.compute_dtype)


class ReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """A `keras.layers.ReversibleEmbedding` whose product, when it is called in reverse, is `backend.matmul`.

    It keeps the name, which Keras writes into weights files.
    """

    def call(self, x, reverse=False):
        if not reverse:
            return super().call(x)
        logits = backend.matmul(x, ops.convert_to_tensor(self.embeddings), transposed=True)
        return soft_cap(logits, self.logit_soft_cap)

    def quantize(self, mode=None, type_check=True, config=None):
        super().quantize(mode, type_check=False, config=config)

    def quantized_call(self, x, reverse=False):
        if self.quantization_mode != "int8" or self.inputs_quantizer is None or not reverse:
            return super().quantized_call(x, reverse=reverse)
        x, x_scale = self.inputs_quantizer(x, axis=-1)
        logits = backend.int8_matmul(x, ops.convert_to_tensor(self.embeddings), transposed=True)
        return soft_cap(ops.cast(logits, "float32") / (x_scale * self.embeddings_scale), self.logit_soft_cap)


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
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer=initializer, name="scale")

    def call(self, x):
        x = ops.cast(x, "float32")
        x = x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + self.epsilon)
        return ops.cast(x * (1.0 + ops.cast(self.scale, "float32")), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
