"""Rotary positions, the soft cap, RMS normalisation and the one kind of projection."""

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.low_rank import LowRankUpdate, low_rank_product


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
    """A matrix [units, in] without bias; all projections are such, so that LoRA and int8 meet plain matrices."""
    initializer = initial.below(name)("weight")
    return Projection(units, use_bias=False, kernel_initializer=initializer, dtype=dtype, name=name)


def int8_product(x, weight, scale, quantizer, transposed=False):
    """`x` [..., in] times the matrix that int8 `weight` [in, out], divided by `scale` [out], stands for; float32.

    `x` is rounded to int8, too, and its gradient is that of the product without this rounding, whose own would be 0.

    Args:
        quantizer: of `x`, with Keras's interface; None to leave `x` as it is.
        transposed: whether `weight` is [out, in] instead.
    """
    scale = ops.cast(scale, "float32")
    if quantizer is None:
        return ops.cast(backend.matmul(x, ops.cast(weight, x.dtype), transposed), "float32") / scale

    @ops.custom_gradient
    def product(x, weight, scale):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            # The scale goes to the side that has no more than a row for each token.
            upstream = ops.cast(upstream / scale, x.dtype)
            return backend.matmul(upstream, ops.cast(weight, x.dtype), not transposed), None, None

        rounded, x_scale = quantizer(x, axis=-1)
        products = ops.cast(backend.int8_matmul(rounded, weight, transposed), "float32")
        return products / (ops.cast(x_scale, "float32") * scale), gradient

    return product(x, ops.convert_to_tensor(weight), scale)


class Projection(LowRankUpdate, keras.layers.Dense):
    """A `keras.layers.Dense` without bias whose matrix is the variable `weight` [units, in].

    So PyTorch and Hugging Face have it, and `backend.matmul` is up to twice as fast for few rows. Keras's own `kernel`
    [in, units] is what Keras's files have, and what takes the place of `weight` in a quantized layer.
    """

    takes_row_factors = True

    def build(self, input_shape):
        if self.quantization_mode:
            super().build(input_shape)
            return
        size = input_shape[-1]
        # Under Keras's name for the variable, whatever its shape, for Keras reads its dtype and freezes it.
        self._kernel = self.add_weight(name="weight", shape=(self.units, size), initializer=self.kernel_initializer)
        self.bias = None
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: size})
        self.built = True

    @property
    def adapted_shape(self):
        return self.input_spec.axes[-1], self.units

    @property
    def weight(self):
        """The variable [units, in], without adapters; None in a quantized layer."""
        return None if self.quantization_mode else self._kernel

    @property
    def kernel(self):
        """The matrix [in, units]; with an adapter the merged one, but for an int8 matrix, which stays as it is."""
        if self.quantization_mode:
            return self._kernel if self.lora_enabled else super().kernel
        return ops.transpose(self.merged(self._kernel, transposed=True) if self.lora_enabled else self._kernel)

    def call(self, x, training=None):
        product = backend.matmul(x, ops.convert_to_tensor(self._kernel), transposed=True)
        return self._with_update(product, x, training)

    def quantize(self, mode=None, type_check=True, config=None):
        if self.weight is not None and mode in self.variable_serialization_spec:
            # Keras quantizes a matrix [in, units].
            kernel = ops.transpose(self._kernel)
            self._untrack_variable(self._kernel)
            self._kernel = self.add_weight(name="kernel", shape=kernel.shape, initializer=lambda *_, **__: kernel)
        super().quantize(mode, type_check, config)

    def load_own_variables(self, store):
        if self.weight is not None:
            store = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118 (Keras's store only has keys)
            store = {key: value.T if key == "0" else value for key, value in store.items()}
        super().load_own_variables(store)

    def quantized_call(self, x, training=None):
        if self.quantization_mode != "int8":
            return super().quantized_call(x, training=training)
        product = int8_product(x, self._kernel, self.kernel_scale, self.inputs_quantizer)
        return self._with_update(product, x, training)

    def _with_update(self, product, x, training):
        if self.lora_enabled:
            if training and self.lora_dropout:
                x = keras.random.dropout(ops.cast(x, "float32"), self.lora_dropout, seed=self.lora_seed)
            product = ops.cast(product, "float32") + low_rank_product(x, *self.lora_factors, self.lora_scale)
        return ops.cast(product, self.compute_dtype)


class ReversibleEmbedding(LowRankUpdate, keras.layers.ReversibleEmbedding):
    """A `keras.layers.ReversibleEmbedding` whose products in reverse are `backend.matmul` and `int8_product`.

    It keeps the name, which Keras writes into weights files. An adapter changes rows and logits alike; dropout has no
    part in it, for there is no sense in dropping a part of an id.
    """

    lora_factor_names = ("lora_embeddings_a", "lora_embeddings_b")

    @property
    def table(self):
        """The variable [V, D], without adapters."""
        return self._embeddings

    @property
    def adapted_shape(self):
        return self.input_dim, self.output_dim

    def enable_lora(self, rank, lora_alpha=None, a_initializer="zeros", b_initializer="random_normal", dropout=0.0):
        # A starts at 0 and not B, as in PEFT: each token moves by B times what it has learned.
        super().enable_lora(rank, lora_alpha, a_initializer, b_initializer, dropout=0.0)

    @property
    def embeddings(self):
        """The matrix [V, D]; with an adapter the merged one, but for an int8 matrix, which stays as it is."""
        if not self.lora_enabled:
            return super().embeddings
        return self._embeddings if self.quantization_mode else self.merged(self._embeddings)

    def call(self, x, reverse=False):
        if reverse:
            logits = backend.matmul(x, ops.convert_to_tensor(self._embeddings), transposed=True)
            return self._capped_with_update(logits, x)
        ids = ops.cast(x, "int32")
        rows = backend.take_rows(ops.convert_to_tensor(self._embeddings), ids)
        if self.lora_enabled:
            a, b = self.lora_factors
            update = backend.matmul(ops.take(a, ids, axis=0) * self.lora_scale, ops.convert_to_tensor(b))
            rows = ops.cast(rows, "float32") + update
        return ops.cast(rows, self.compute_dtype)

    def quantized_call(self, x, reverse=False):
        if self.quantization_mode != "int8" or not reverse:
            return super().quantized_call(x, reverse=reverse)
        logits = int8_product(x, self._embeddings, self.embeddings_scale, self.inputs_quantizer, transposed=True)
        return self._capped_with_update(logits, x)

    def _capped_with_update(self, logits, x):
        if self.lora_enabled:
            a, b = self.lora_factors
            logits = ops.cast(logits, "float32") + low_rank_product(x, b, a, self.lora_scale, transposed=True)
        return soft_cap(logits, self.logit_soft_cap)


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
