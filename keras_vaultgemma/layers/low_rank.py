"""The low-rank update of a frozen matrix, W + s A B (LoRA, Hu et al., 2021, arXiv:2106.09685), in a layer."""

import keras
from keras import ops

from keras_vaultgemma import backend


def low_rank_matmul(x, first, second, scale, transposed=False):
    """`x` [..., in] times `first` [in, r], `second` [r, out] and `scale`, in float32, without their product [in, out].

    Args:
        first, second: variables or tensors; with a first axis B, one matrix for each row of `x` [B, T, in].
        transposed: whether the matrices are [r, in] and [out, r] instead.
    """
    x = backend.matmul(ops.cast(x, "float32"), backend.value_of(first), transposed)
    second = backend.value_of(second)
    return (
        backend.matmul(x * scale, second, transposed)
        if transposed
        else backend.expanded(x * scale, second)
    )


class LowRankUpdate:
    """What a Keras layer with a matrix needs beyond Keras's own LoRA; stands before the Keras layer among the bases.

    Keras adds A B, a matrix as large as W, to W in every call. Here the layer computes x W + s (x A) B, in float32 but
    for x W. Factors are float32 variables under every dtype policy.

    Attributes:
        adapted_shape: (in, out), from the Keras layer.
        lora_enabled: whether the layer has factors.
        lora_rank, lora_alpha: r, and s times r.
        lora_dropout: part of the adapter's input that is dropped in training.
    """

    lora_factor_names = ("lora_kernel_a", "lora_kernel_b")
    """Keras's names for A [in, r] and B [r, out]."""

    lora_dropout = 0.0

    takes_row_factors = False
    """Whether the layer also computes with factors [B, in, r] and [B, r, out], one pair for each row of a batch."""

    def enable_lora(
        self, rank, lora_alpha=None, a_initializer="he_uniform", b_initializer="zeros", dropout=0.0
    ):
        """Add factors and freeze the matrix.

        Args:
            rank: r.
            lora_alpha: s times r. Defaults to `rank`.
            a_initializer, b_initializer: of the factors.
            dropout: part of the adapter's input that is dropped in training.

        Raises:
            ValueError: for a layer that has factors, or whose matrix is quantized to something else than int8.
        """
        # Keras's own `enable_lora` would ask for the matrix [in, out], which a projection does not have as it is.
        self.check_base(self.quantization_mode)
        if self.lora_enabled:
            raise ValueError(
                f"A layer has one adapter at most. Received: {self.path}, which has factors"
            )
        inputs, outputs = self.adapted_shape
        shapes, initializers = ((inputs, rank), (rank, outputs)), (a_initializer, b_initializer)
        for variable in self.weights:
            variable.trainable = False
        self._tracker.unlock()
        for name, shape, initializer in zip(
            self.lora_factor_names, shapes, initializers, strict=True
        ):
            # Not cast: Keras would round the factors to a 16-bit compute dtype in every call.
            options = dict(
                initializer=keras.initializers.get(initializer), dtype="float32", autocast=False
            )
            setattr(self, name, self.add_weight(name=name, shape=shape, **options))
        if dropout and not hasattr(self, "lora_seed"):
            self.lora_seed = keras.random.SeedGenerator()
        self._tracker.lock()
        self.lora_enabled = True
        self.lora_rank, self.lora_alpha = rank, rank if lora_alpha is None else lora_alpha
        self.lora_dropout = dropout

    def disable_lora(self):
        """Take the factors away and leave the matrix frozen."""
        for variable in self.lora_factors:
            self._untrack_variable(variable)
        # Not by `del`: Keras collects garbage for each, which takes longer than everything else together.
        for name in self.lora_factor_names:
            setattr(self, name, None)
        self.trainable = False
        self.lora_enabled = False
        self.lora_rank = self.lora_alpha = None
        self.lora_dropout = 0.0

    @property
    def lora_factors(self):
        """The variables A [in, r] and B [r, out]; none without an adapter."""
        return (
            tuple(getattr(self, name) for name in self.lora_factor_names)
            if self.lora_enabled
            else ()
        )

    @property
    def lora_scale(self):
        """s."""
        return self.lora_alpha / self.lora_rank

    def quantize(self, mode=None, type_check=True, config=None):
        if self.lora_enabled:
            self.check_base(mode)
        # Keras quantises subclasses only where they say so.
        super().quantize(mode, type_check=False, config=config)

    def merged(self, matrix, transposed=False):
        """W + s A B in the dtype of `matrix` W [in, out], rounded once; `transposed`, both are [out, in]."""
        a, b = self.lora_factors
        update = self.lora_scale * (
            ops.matmul(ops.transpose(b), ops.transpose(a)) if transposed else ops.matmul(a, b)
        )
        return ops.cast(ops.cast(matrix, "float32") + update, matrix.dtype)

    def check_base(self, mode):
        """Raise ValueError for a quantization mode that no adapter can stand on."""
        if mode not in (None, "int8"):
            raise ValueError(
                f"An adapter needs a base in floating point or int8. Received: {self.path} in {mode}"
            )
