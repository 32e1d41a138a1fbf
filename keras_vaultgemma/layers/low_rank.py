"""Low-rank update of a frozen matrix: W + s A B.

References:
    - [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
"""

import keras
from keras import ops

from keras_vaultgemma import backend


def low_rank_matmul(x, first, second, scale, transposed=False):
    """Return `x @ first @ second * scale` in float32, without the matrix `first @ second`.

    Args:
        x: tensor [..., in].
        first: variable or tensor [in, r], or [U, in, r], as for `backend.matmul`.
        second: variable or tensor [r, out], or [U, r, out].
        scale: float.
        transposed: bool. True if the matrices are [r, in] and [out, r] instead. Defaults to False.
    """
    x = backend.matmul(ops.cast(x, "float32"), backend.value_of(first), transposed)
    return backend.matmul(x * scale, backend.value_of(second), transposed)


class LowRankUpdate:
    """Mixin that adds a low-rank adapter to a Keras layer with one matrix.

    It precedes the Keras layer among the bases. Keras's own LoRA adds A B, a matrix as large as W,
    to W in every call; this layer computes `x W + s (x A) B`, in float32 but for `x W`. Factors are
    float32 variables under every dtype policy.

    Attributes:
        adapted_shape: tuple `(in, out)`.
        lora_enabled: bool. True if the layer has factors.
        lora_rank: int r, or None.
        lora_alpha: float, s times r, or None.
        lora_dropout: float. Dropout rate of the adapter's input in training.
    """

    lora_factor_names = ("lora_kernel_a", "lora_kernel_b")
    """Keras's names of the factors A [in, r] and B [r, out]."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_dropout = 0.0
        self.lora_seed = None

    def enable_lora(
        self, rank, lora_alpha=None, a_initializer="he_uniform", b_initializer="zeros", dropout=0.0
    ):
        """Add factors and freeze the matrix.

        Args:
            rank: int. Rank r.
            lora_alpha: float. s times r. Defaults to `rank`.
            a_initializer: Keras initializer of A. Defaults to `"he_uniform"`.
            b_initializer: Keras initializer of B. Defaults to `"zeros"`.
            dropout: float. Dropout rate of the adapter's input in training. Defaults to 0.

        Raises:
            ValueError: If the layer has factors, or its matrix is quantized in another mode than
                int8.
        """
        # Not Keras's `enable_lora`, because it reads `kernel`, which a projection has to transpose.
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
            # Without autocast, which would round the factors to a 16-bit compute dtype.
            options = dict(dtype="float32", autocast=False)
            initializer = keras.initializers.get(initializer)
            factor = self.add_weight(name=name, shape=shape, initializer=initializer, **options)
            setattr(self, name, factor)
        if dropout and self.lora_seed is None:
            self.lora_seed = keras.random.SeedGenerator()
        self._tracker.lock()
        self.lora_enabled = True
        self.lora_rank, self.lora_alpha = rank, rank if lora_alpha is None else lora_alpha
        self.lora_dropout = dropout

    def disable_lora(self):
        """Remove the factors. The matrix stays frozen."""
        for variable in self.lora_factors:
            self._untrack_variable(variable)
        # Not `del`, because Keras then collects garbage, for minutes in a model of 183 layers.
        for name in self.lora_factor_names:
            setattr(self, name, None)
        self.trainable = False
        self.lora_enabled = False
        self.lora_rank = self.lora_alpha = None
        self.lora_dropout = 0.0

    @property
    def lora_factors(self):
        """Tuple of the variables A [in, r] and B [r, out], empty without an adapter."""
        if not self.lora_enabled:
            return ()
        return tuple(getattr(self, name) for name in self.lora_factor_names)

    @property
    def lora_scale(self):
        """The scale s."""
        return self.lora_alpha / self.lora_rank

    def quantize(self, mode=None, type_check=True, config=None):
        if self.lora_enabled:
            self.check_base(mode)
        # Keras quantizes subclasses only without the type check.
        super().quantize(mode, type_check=False, config=config)

    def merged(self, matrix, transposed=False):
        """Return W + s A B in the dtype of the matrix W, rounded once.

        Args:
            matrix: tensor [in, out].
            transposed: bool. True if `matrix` and the result are [out, in] instead. Defaults to
                False.
        """
        a, b = self.lora_factors
        update = self.lora_scale * (
            ops.matmul(ops.transpose(b), ops.transpose(a)) if transposed else ops.matmul(a, b)
        )
        return ops.cast(ops.cast(matrix, "float32") + update, matrix.dtype)

    def check_base(self, mode):
        """Raise ValueError for a quantization mode that an adapter cannot be added to."""
        if mode not in (None, "int8"):
            raise ValueError(
                "An adapter needs a base in floating point or int8. Received: "
                f"{self.path} in {mode}"
            )

    def get_config(self):
        """Return the config of the layer without its adapter, which is saved separately."""
        config = super().get_config()
        return {k: v for k, v in config.items() if k not in ("lora_rank", "lora_alpha")}
