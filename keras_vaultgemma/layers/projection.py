"""TODO."""

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.int8 import int8_matmul
from keras_vaultgemma.layers.low_rank import LowRankUpdate, low_rank_matmul


def projection(units, name, initial, dtype):
    """A matrix [units, in] without bias; all projections are such, so that LoRA and int8 meet plain matrices."""
    initializer = initial.below(name)("weight")
    return Projection(units, use_bias=False, kernel_initializer=initializer, dtype=dtype, name=name)


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
        self._kernel = self.add_weight(
            name="weight", shape=(self.units, size), initializer=self.kernel_initializer
        )
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
        return ops.transpose(
            self.merged(self._kernel, transposed=True) if self.lora_enabled else self._kernel
        )

    def call(self, x, training=None):
        product = backend.matmul(x, ops.convert_to_tensor(self._kernel), transposed=True)
        return self._with_update(product, x, training)

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
            store = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118 (Keras's store only has keys)
            store = {key: value.T if key == "0" else value for key, value in store.items()}
        super().load_own_variables(store)

    def quantized_call(self, x, training=None):
        if self.quantization_mode != "int8":
            return super().quantized_call(x, training=training)
        product = int8_matmul(x, self._kernel, self.kernel_scale, self.inputs_quantizer)
        return self._with_update(product, x, training)

    def _with_update(self, product, x, training):
        if self.lora_enabled:
            if training and self.lora_dropout:
                x = keras.random.dropout(
                    ops.cast(x, "float32"), self.lora_dropout, seed=self.lora_seed
                )
            product = ops.cast(product, "float32") + low_rank_matmul(
                x, *self.lora_factors, self.lora_scale
            )
        return ops.cast(product, self.compute_dtype)
