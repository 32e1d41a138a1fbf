"""The token embedding, which is also the language-model head."""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers import int4
from keras_vaultgemma.layers.int8 import int8_matmul
from keras_vaultgemma.layers.low_rank import LowRankUpdate, low_rank_matmul
from keras_vaultgemma.layers.soft_cap import soft_cap


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class ReversibleEmbedding(LowRankUpdate, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` with the matmuls and adapters of this package.

    It has Keras's class name, because that is part of the paths in weights files. An adapter
    changes rows and logits alike, without dropout, because dropping a part of an id has no meaning.

    Args:
        *args: arguments of `keras.layers.ReversibleEmbedding`.
        stored_values: `StoredValues` of this layer. Not part of the config. Defaults to None, for
            values from `embeddings_initializer`.
        **kwargs: arguments of `keras.layers.ReversibleEmbedding`.

    Example:

    ```python
    import numpy as np
    from keras_vaultgemma.layers.reversible_embedding import ReversibleEmbedding

    embedding = ReversibleEmbedding(input_dim=10, output_dim=4)
    logits = embedding(embedding(np.array([[3, 7]])), reverse=True)  # [1, 2, 10]
    ```
    """

    lora_factor_names = ("lora_embeddings_a", "lora_embeddings_b")
    quantized_axis = -1
    zero_factor = 0

    def __init__(self, *args, stored_values=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._stored_values = stored_values

    def build(self, input_shape=None):
        random = self.embeddings_initializer
        if self._stored_values is not None:
            self.embeddings_initializer = self._stored_values.initializer("embeddings")
        super().build(input_shape)
        self.embeddings_initializer = random

    @property
    def table(self):
        """The variable [V, D], without adapters."""
        return self._embeddings

    @property
    def adapted_shape(self):
        return self.input_dim, self.output_dim

    def enable_lora(
        self,
        rank,
        lora_alpha=None,
        a_initializer="zeros",
        b_initializer="random_normal",
        dropout=0.0,
    ):
        # A starts at 0 instead of B, as in PEFT, so that rows change only for tokens of the data.
        super().enable_lora(rank, lora_alpha, a_initializer, b_initializer, dropout=0.0)

    @property
    def embeddings(self):
        """The matrix [V, D], merged with an adapter unless it is quantized."""
        if not self.lora_enabled:
            return super().embeddings
        return self._embeddings if self.quantization_mode else self.merged(self._embeddings)

    def quantize(self, mode=None, type_check=True, config=None):
        block = getattr(config, "block_size", None) or -1
        if mode != "int4" or block == -1 or self.quantization_mode:
            super().quantize(mode, type_check, config)
            return
        # As Keras does it, but in blocks of rows: Keras makes several copies of the whole table.
        table = backend.numpy_view(self._embeddings)
        values = int4.quantize_rows(table, block)
        del self._embeddings
        self.quantized_build(table.shape, mode, config)
        self.quantization_config = config
        variables = self._embeddings, self.embeddings_scale, self.embeddings_zero
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        name = f"int4/{block}_from_{self.dtype_policy.name}"
        self.dtype_policy = keras.dtype_policies.get(name)

    @property
    def int4_matrix(self):
        """The matrix [V, D] in int4."""
        variables = self._embeddings, self.embeddings_scale, getattr(self, "embeddings_zero", None)
        return int4.Int4Matrix.of(variables, self._int4_block_size, 1, self.output_dim)

    def call(self, x, reverse=False):
        if reverse:
            logits = backend.matmul(x, backend.value_of(self._embeddings), transposed=True)
            return soft_cap(self._add_update(logits, x), self.logit_soft_cap)
        ids = ops.cast(x, "int32")
        return self._add_row_update(backend.take_rows(backend.value_of(self._embeddings), ids), ids)

    def _add_row_update(self, rows, ids):
        if self.lora_enabled:
            a, b = self.lora_factors
            update = backend.thin_matmul(
                ops.take(a, ids, axis=0) * self.lora_scale, backend.value_of(b)
            )
            rows = ops.cast(rows, "float32") + update
        return ops.cast(rows, self.compute_dtype)

    def quantized_call(self, x, reverse=False):
        if self.quantization_mode == "int4":
            if reverse:
                logits = self.int4_matrix.matmul(x, transposed=True)
                return soft_cap(self._add_update(logits, x), self.logit_soft_cap)
            ids = ops.cast(x, "int32")
            return self._add_row_update(self.int4_matrix.rows(ids, self.compute_dtype), ids)
        if self.quantization_mode != "int8" or not reverse:
            return super().quantized_call(x, reverse=reverse)
        logits = int8_matmul(
            x, self._embeddings, self.embeddings_scale, self.inputs_quantizer, transposed=True
        )
        return soft_cap(self._add_update(logits, x), self.logit_soft_cap)

    def _add_update(self, logits, x):
        if not self.lora_enabled:
            return logits
        a, b = self.lora_factors
        update = low_rank_matmul(x, b, a, self.lora_scale, transposed=True)
        return ops.cast(logits, "float32") + update
