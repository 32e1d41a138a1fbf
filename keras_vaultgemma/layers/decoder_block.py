"""One transformer block: normalise, attend, add; normalise, GeGLU, add.

Gemma 2 also normalises what attention and the MLP return. VaultGemma has no such post-norms.
"""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.attention import VaultGemmaAttention
from keras_vaultgemma.layers.direct_call import call_layer
from keras_vaultgemma.layers.projection import Projection
from keras_vaultgemma.layers.rms_norm import RMSNorm


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaDecoderBlock(keras.layers.Layer):
    """Pre-norm block of attention and a gated MLP with `gelu(gate) * up` (GeGLU).

    Args:
        num_query_heads: int. N.
        num_key_value_heads: int. K, a divisor of N.
        head_dim: int. H.
        intermediate_dim: int. Width F of one branch of the MLP.
        query_pre_attn_scalar: float. Scores are divided by its square root. Defaults to `head_dim`.
        attention_logit_soft_cap: float. Soft cap of the scores. Defaults to None.
        layer_norm_epsilon: float. Epsilon of both norms. Defaults to 1e-6.
        initializer_range: float. Standard deviation of random initial weights. Defaults to 0.02.
        stored_values: `StoredValues` of this layer. Not part of the config. Defaults to None, for
            random values.

    Attributes:
        gradient_checkpointing: bool. True to save only the block's input for the backward pass and
            recompute the rest.

    Example:

    ```python
    from keras import ops
    from keras_vaultgemma.layers.attention import causal_mask
    from keras_vaultgemma.layers.decoder_block import VaultGemmaDecoderBlock
    from keras_vaultgemma.layers.rotary import RotaryAngles

    positions = ops.arange(3)[None]
    block = VaultGemmaDecoderBlock(
        num_query_heads=2, num_key_value_heads=1, head_dim=4, intermediate_dim=16
    )
    y = block(
        ops.ones((1, 3, 8)),
        angles=RotaryAngles(4, 10_000.0)(positions),
        attention_mask=causal_mask(positions, positions),
    )
    ```

    References:
        - [Shazeer, 2020](https://arxiv.org/abs/2002.05202)
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        intermediate_dim,
        query_pre_attn_scalar=None,
        attention_logit_soft_cap=None,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
        stored_values=None,
        **kwargs,
    ):
        # Without autocast, which would cast the angles to a 16-bit compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_dim = intermediate_dim
        self.query_pre_attn_scalar = query_pre_attn_scalar or head_dim
        self.attention_logit_soft_cap = attention_logit_soft_cap
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.gradient_checkpointing = False
        self._stored_values = stored_values
        self.attention_norm = self._norm("attention_norm")
        self.attention = VaultGemmaAttention(
            num_query_heads,
            num_key_value_heads,
            head_dim,
            self.query_pre_attn_scalar,
            attention_logit_soft_cap,
            initializer_range,
            self._stored("attention"),
            dtype=self.dtype_policy,
            name="attention",
        )
        self.mlp_norm = self._norm("mlp_norm")

    def _stored(self, name):
        return self._stored_values and self._stored_values.sublayer(name)

    def _norm(self, name):
        stored = self._stored(name)
        return RMSNorm(self.layer_norm_epsilon, stored, dtype=self.dtype_policy, name=name)

    def _projection(self, name, units):
        stored = self._stored(name)
        return Projection(units, self.initializer_range, stored, dtype=self.dtype_policy, name=name)

    def build(self, input_shape):
        self.gate = self._projection("gate", self.intermediate_dim)
        self.up = self._projection("up", self.intermediate_dim)
        self.down = self._projection("down", input_shape[-1])
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.gate, self.up):
            layer.build(input_shape)
        self.down.build((*input_shape[:-1], self.intermediate_dim))

    def call(self, x, angles, attention_mask, cache=None, start=None, training=None):
        """Apply the block; the arguments and the result are those of `VaultGemmaAttention.call`."""
        if cache is None and self.gradient_checkpointing:
            return self._apply_with_remat(x, angles, attention_mask, training)
        return self._apply(x, angles, attention_mask, training, cache, start)

    def _apply_with_remat(self, x, angles, attention_mask, training):
        """Apply the block and save only its input for the backward pass."""
        weights = {id(v) for v in self.weights}
        seeds = [v for v in self.variables if id(v) not in weights]
        # Not `trainable_weights`, which is empty for a frozen block with adapters.
        trained = [v for v in self.weights if v.trainable]
        fixed = [(v, backend.value_of(v)) for v in self.weights if not v.trainable]

        def apply(x, *values):
            # Trained values are arguments, because not every backend differentiates with respect to
            # captured ones. Seeds are, too, because dropout advances them, and the recomputation
            # must draw the same numbers and change nothing.
            with keras.StatelessScope(state_mapping=fixed) as scope:
                for variable, value in zip([*trained, *seeds], values, strict=True):
                    scope.add_update((variable, value))
                x = self._apply(x, angles, attention_mask, training)
                return x, *[scope.get_current_value(v) for v in seeds]

        trained_values = [backend.value_of(v) for v in trained]
        seed_values = [ops.copy(backend.value_of(v)) for v in seeds]
        x, *new_seeds = backend.remat(apply)(x, *trained_values, *seed_values)
        for seed, value in zip(seeds, new_seeds, strict=True):
            seed.assign(value)
        return x

    def _apply(self, x, angles, attention_mask, training, cache=None, start=None):
        # `training` is an argument of every layer, because Keras does not know it in the backward
        # pass, which may recompute this.
        options = dict(
            angles=angles,
            attention_mask=attention_mask,
            cache=cache,
            start=start,
            training=training,
        )
        # No recomputation within a recomputed block.
        recompute = cache is None and not self.gradient_checkpointing
        normed = call_layer(self.attention_norm, x)
        attended = call_layer(self.attention, normed, recompute=recompute, **options)
        if cache is not None:
            attended, cache = attended
        x = x + attended
        normed = call_layer(self.mlp_norm, x)
        gate = call_layer(self.gate, normed, training=training)
        up = call_layer(self.up, normed, training=training)
        # Compiled in training only, so that a model exported for serving needs no XLA.
        gelu = backend.remat(gated, elementwise=bool(training)) if recompute else gated
        x = x + call_layer(self.down, gelu(gate, up), training=training)
        return x if cache is None else (x, cache)

    def compute_output_spec(self, x, **kwargs):
        # Declared, because tracing every block would take most of the time to build a model.
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_dim": self.intermediate_dim,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "attention_logit_soft_cap": self.attention_logit_soft_cap,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "initializer_range": self.initializer_range,
        }


def gated(gate, up):
    """Return `gelu(gate) * up`."""
    return keras.activations.gelu(gate, approximate=True) * up
