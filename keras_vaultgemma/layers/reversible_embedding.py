"""TODO."""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.int8 import int8_matmul
from keras_vaultgemma.layers.low_rank import LowRankUpdate, low_rank_matmul
from keras_vaultgemma.layers.soft_cap import soft_cap


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

    def enable_lora(
        self,
        rank,
        lora_alpha=None,
        a_initializer="zeros",
        b_initializer="random_normal",
        dropout=0.0,
    ):
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
            update = backend.matmul(
                ops.take(a, ids, axis=0) * self.lora_scale, ops.convert_to_tensor(b)
            )
            rows = ops.cast(rows, "float32") + update
        return ops.cast(rows, self.compute_dtype)

    def quantized_call(self, x, reverse=False):
        if self.quantization_mode != "int8" or not reverse:
            return super().quantized_call(x, reverse=reverse)
        logits = int8_matmul(
            x, self._embeddings, self.embeddings_scale, self.inputs_quantizer, transposed=True
        )
        return self._capped_with_update(logits, x)

    def _capped_with_update(self, logits, x):
        if self.lora_enabled:
            a, b = self.lora_factors
            logits = ops.cast(logits, "float32") + low_rank_matmul(
                x, b, a, self.lora_scale, transposed=True
            )
        return soft_cap(logits, self.logit_soft_cap)
