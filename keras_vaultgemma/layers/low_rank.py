"""Low-rank update of a frozen matrix: W + s A B.

References:
    - [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
"""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.int8 import in_blocks


def low_rank_matmul(x, first, second, scale, transposed=False):
    """Return `x @ first @ second * scale` in float32, without the matrix `first @ second`.

    Args:
        x: tensor [..., in].
        first: variable or tensor [in, r], or [U, in, r], as for `backend.matmul`.
        second: variable or tensor [r, out], or [U, r, out].
        scale: float.
        transposed: bool. True if the matrices are [r, in] and [out, r] instead. Defaults to False.
    """
    x = backend.thin_matmul(ops.cast(x, "float32"), backend.value_of(first), transposed)
    return backend.thin_matmul(x * scale, backend.value_of(second), transposed)


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

    zero_factor = 1
    """Index of the factor that starts at zero."""

    saves_merged = False
    """True to save the matrix merged with the adapter instead of the matrix and the factors."""

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
                int8 and int4.
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
    def dtype_policy(self):
        """The policy of this layer, also if it was built with the policies of a whole model.

        Keras would take a quantized layer for one in floating point, and could not save it.
        """
        policy = super().dtype_policy
        is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
        return policy[self.path] if is_map and self.path else policy

    @dtype_policy.setter
    def dtype_policy(self, policy):
        keras.layers.Layer.dtype_policy.fset(self, policy)

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

    quantized_axis = 0
    """Axis of the matrix, as Keras has it, that shares a scale in int8."""

    def quantize(self, mode=None, type_check=True, config=None):
        if self.lora_enabled:
            self.check_base(mode)
        faster = in_blocks(config, self.quantized_axis) if mode == "int8" else config
        # Keras quantizes subclasses only without the type check.
        super().quantize(mode, type_check=False, config=faster)
        self.quantization_config = config

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
        if mode not in (None, "int8", "int4"):
            raise ValueError(
                "An adapter needs a base in floating point, int8 or int4. Received: "
                f"{self.path} in {mode}"
            )

    def save_own_variables(self, store):
        """Save the matrix and, under Keras's names, the factors; or the merged matrix alone."""
        if not self.lora_enabled or self.saves_merged:
            super().save_own_variables(store)
            return
        with self._without_adapter():  # in which Keras would merge the factors
            super().save_own_variables(store)
        for name, factor in zip(self.lora_factor_names, self.lora_factors, strict=True):
            store[name] = factor

    def load_own_variables(self, store):
        """Load the matrix and the factors. Without saved factors, the adapter's update becomes 0.

        It is then an adapter that can be trained, on a matrix with which the layer computes what
        the saved one did. Keras sets both factors to zero, whose gradients are zero for ever.

        Raises:
            ValueError: If factors were saved and the layer has none.
        """
        values = {key: store[key] for key in store.keys()}  # noqa: SIM118
        saved = [values.pop(name) for name in self.lora_factor_names if name in values]
        if saved and not self.lora_enabled:
            raise ValueError(
                f"{self.path} must have an adapter to load weights with one of rank "
                f"{saved[1].shape[0]}: copy or load the whole backbone or model, or call "
                "`enable_lora` first. Received: a layer without an adapter"
            )
        factors = saved or self._factors_without_update()
        super().load_own_variables(values)
        for variable, value in zip(self.lora_factors, factors, strict=True):
            variable.assign(value)

    @property
    def has_update(self):
        """True if the adapter changes what the layer computes."""
        return self.lora_enabled and all(
            np.any(ops.convert_to_numpy(factor)) for factor in self.lora_factors
        )

    def _factors_without_update(self):
        """Return copies of the factors, of which at least one is zero."""
        values = [np.array(ops.convert_to_numpy(factor)) for factor in self.lora_factors]
        if self.has_update:
            values[self.zero_factor][:] = 0
        return values

    @contextlib.contextmanager
    def _without_adapter(self):
        self.lora_enabled = False
        try:
            yield
        finally:
            self.lora_enabled = True

    def __delattr__(self, name):
        # Keras collects garbage after each deleted variable: minutes where 183 layers of the 1B
        # model are quantized. A variable that nothing refers to is freed without that.
        value = getattr(self, name)
        if isinstance(value, keras.Variable):
            self._untrack_variable(value)
            setattr(self, name, None)
        super().__delattr__(name)

    def get_config(self):
        """Return the config of the layer without its adapter, which is saved separately."""
        config = super().get_config()
        return {k: v for k, v in config.items() if k not in ("lora_rank", "lora_alpha")}
