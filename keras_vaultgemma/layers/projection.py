"""Projection: a matrix of weights without bias."""

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.int4 import Int4Matrix
from keras_vaultgemma.layers.int8 import int8_matmul
from keras_vaultgemma.layers.low_rank import LowRankUpdate, low_rank_matmul


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class Projection(LowRankUpdate, keras.layers.Dense):
    """`keras.layers.Dense` without bias, whose matrix is the variable `weight` [units, in].

    PyTorch and Hugging Face have the same layout, and `backend.matmul` is up to twice as fast in it
    for few rows. Files of Keras hold the matrix as `kernel` [in, units], and so does a quantized
    layer. The matrix and the factors of an adapter may have a leading axis, as `backend.matmul`
    takes it, so that rows of a batch are computed with variables of their own.

    Args:
        units: int. Size of the output.
        initializer_range: float. Standard deviation of random initial weights. Defaults to 0.02.
        stored_values: `StoredValues` of this layer. Not part of the config. Defaults to None, for
            random values.
        quantization_config: as for `keras.layers.Dense`.

    Example:

    ```python
    import numpy as np
    from keras_vaultgemma.layers.projection import Projection

    y = Projection(units=3)(np.ones((1, 2, 4), "float32"))  # [1, 2, 3]
    ```
    """

    def __init__(
        self, units, initializer_range=0.02, stored_values=None, quantization_config=None, **kwargs
    ):
        super().__init__(
            units,
            use_bias=False,
            kernel_initializer=keras.initializers.RandomNormal(stddev=initializer_range),
            quantization_config=quantization_config,
            **kwargs,
        )
        self.initializer_range = initializer_range
        self._stored_values = stored_values

    def build(self, input_shape):
        if self.quantization_mode:
            super().build(input_shape)
            return
        size, stored = input_shape[-1], self._stored_values
        # In the attribute of Keras's variable, because Keras reads its dtype and freezes it.
        self._kernel = self.add_weight(
            name="weight",
            shape=(self.units, size),
            initializer=self.kernel_initializer if stored is None else stored.initializer("weight"),
        )
        self.bias = None
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: size})
        self.built = True

    @property
    def adapted_shape(self):
        return self.input_spec.axes[-1], self.units

    @property
    def weight(self):
        """The variable [units, in], without adapters, or None in a quantized layer."""
        return None if self.quantization_mode else self._kernel

    @property
    def int4_matrix(self):
        """The matrix [in, units] in int4."""
        variables = self._kernel, self.kernel_scale, getattr(self, "kernel_zero", None)
        return Int4Matrix.of(variables, self._int4_block_size, 0, self.units)

    @property
    def kernel(self):
        """The matrix [in, units], merged with an adapter unless it is quantized."""
        if self.quantization_mode:
            return self._kernel if self.lora_enabled else super().kernel
        return ops.transpose(
            self.merged(self._kernel, transposed=True) if self.lora_enabled else self._kernel
        )

    def call(self, x, training=None):
        product = backend.matmul(x, backend.value_of(self._kernel), transposed=True)
        return self._add_update(product, x, training)

    def quantized_call(self, x, training=None):
        if self.quantization_mode == "int4":
            product = self.int4_matrix.matmul(x)
        elif self.quantization_mode == "int8":
            product = int8_matmul(x, self._kernel, self.kernel_scale, self.inputs_quantizer)
        else:
            return super().quantized_call(x, training=training)
        return ops.cast(self._add_update(product, x, training), self.compute_dtype)

    def _add_update(self, product, x, training):
        if not self.lora_enabled:
            return product
        if training and self.lora_dropout:
            x = keras.random.dropout(ops.cast(x, "float32"), self.lora_dropout, seed=self.lora_seed)
        update = low_rank_matmul(x, *self.lora_factors, self.lora_scale)
        return ops.cast(ops.cast(product, "float32") + update, self.compute_dtype)

    def quantize(self, mode=None, type_check=True, config=None):
        if self.weight is not None and mode in self.variable_serialization_spec:
            # Keras quantizes a matrix [in, units].
            kernel = ops.transpose(self._kernel)
            self._untrack_variable(self._kernel)
            self._kernel = self.add_weight(
                name="kernel", shape=kernel.shape, initializer=lambda *_, **__: kernel
            )
        super().quantize(mode, type_check, config)

    def load_own_variables(self, store):
        if self.weight is not None:
            values = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118
            store = {key: value.T if key == "0" else value for key, value in values.items()}
        super().load_own_variables(store)

    def get_config(self):
        config = super().get_config()
        names = ("name", "trainable", "dtype", "units", "quantization_config")
        return {
            **{name: config[name] for name in names},
            "initializer_range": self.initializer_range,
        }
