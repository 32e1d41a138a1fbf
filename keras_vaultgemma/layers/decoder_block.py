"""One transformer block: normalise, attend, add; normalise, GeGLU, add.

Gemma 2 also normalises what attention and the MLP return. VaultGemma does not: those two norms are what it left out.
"""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.projection import projection
from keras_vaultgemma.layers.rms_norm import RMSNorm


class VaultGemmaDecoderBlock(keras.layers.Layer):
    """Pre-norm block of attention and a gated MLP with `gelu(gate) * up` (GeGLU, Shazeer 2020, arXiv:2002.05202).

    Args:
        attention: the block's `VaultGemmaAttention`.
        intermediate_dim: width F of one branch of the MLP.
        layer_type: "full_attention" or "sliding_attention": which of the walk's masks this block is given.
        layer_norm_epsilon: of both norms.
        initial: `layers.Initial` of this layer.
    """

    def __init__(
        self,
        attention,
        intermediate_dim,
        layer_type,
        layer_norm_epsilon,
        initial,
        **kwargs,
    ):
        # Keras would cast the angles to a 16-bit compute dtype on the way in.
        super().__init__(autocast=False, **kwargs)
        self.intermediate_dim = intermediate_dim
        self.layer_type = layer_type
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initial = initial
        self.gradient_checkpointing = False
        self.attention_norm = self._norm(layer_norm_epsilon, initial, "attention_norm")
        self.attention = attention
        self.mlp_norm = self._norm(layer_norm_epsilon, initial, "mlp_norm")

    def _norm(self, epsilon, initial, name):
        return RMSNorm(epsilon, initial.below(name), dtype=self.dtype_policy, name=name)

    def build(self, input_shape):
        options = (self.initial, self.dtype_policy)
        self.gate = projection(self.intermediate_dim, "gate", *options)
        self.up = projection(self.intermediate_dim, "up", *options)
        self.down = projection(input_shape[-1], "down", *options)
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.gate, self.up):
            layer.build(input_shape)
        self.down.build((*input_shape[:-1], self.intermediate_dim))

    def call(self, x, angles, attention_mask, cache=None, start=None, training=None):
        """As `VaultGemmaAttention.call`: [B, T, D] in and out, with a cache a pair of that and the new cache."""
        if cache is None and self.gradient_checkpointing:
            return self._apply_twice(x, angles, attention_mask, training)
        return self._apply(x, angles, attention_mask, training, cache, start)

    def _apply_twice(self, x, angles, attention_mask, training):
        """`_apply`, of which nothing but the input is kept for the backward pass, which computes it again."""
        weights = {id(v) for v in self.weights}
        seeds = [v for v in self.variables if id(v) not in weights]
        # Not `trainable_weights`: of a frozen block with adapters Keras says that it has none.
        trained = [v for v in self.weights if v.trainable]
        fixed = [(v, backend.value_of(v)) for v in self.weights if not v.trainable]

        def apply(x, *values):
            # What has gradients comes as an argument, since not every backend follows it into a function. Dropout moves
            # its seed on, and what is computed twice must draw the same and change nothing.
            with keras.StatelessScope(state_mapping=fixed) as scope:
                for variable, value in zip([*trained, *seeds], values, strict=True):
                    scope.add_update((variable, value))
                x = self._apply(x, angles, attention_mask, training)
                return x, *[scope.get_current_value(v) for v in seeds]

        values = [backend.value_of(v) for v in trained] + [
            ops.copy(backend.value_of(v)) for v in seeds
        ]
        x, *states = backend.remat(apply)(x, *values)
        for seed, state in zip(seeds, states, strict=True):
            seed.assign(state)
        return x

    def _apply(self, x, angles, attention_mask, training, cache=None, start=None):
        # Said to each layer, for in the backward pass, which may compute this again, Keras knows of no training.
        options = dict(
            angles=angles,
            attention_mask=attention_mask,
            cache=cache,
            start=start,
            training=training,
        )
        # What is computed again as a whole need not be computed a third time.
        recompute = cache is None and not self.gradient_checkpointing
        attended = self.attention(self.attention_norm(x), recompute=recompute, **options)
        if cache is not None:
            attended, cache = attended
        x = x + attended
        normed = self.mlp_norm(x)
        # As for the scores: gelu keeps several tensors of its own for the backward pass.
        # In training only: a model exported for serving then needs no XLA.
        gated_by = backend.remat(gated, elementwise=bool(training)) if recompute else gated
        gate, up = self.gate(normed, training=training), self.up(normed, training=training)
        x = x + self.down(gated_by(gate, up), training=training)
        return x if cache is None else (x, cache)

    def compute_output_spec(self, x, **kwargs):
        """Said outright: Keras would trace every block to find out, which takes most of the time to build a model."""
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)


def gated(gate, up):
    """gelu(gate) * up."""
    return keras.activations.gelu(gate, approximate=True) * up
