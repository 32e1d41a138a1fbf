"""The VaultGemma backbone: token ids to hidden states in one forward pass over the blocks.

It differs from Gemma 2 (keras-hub's `GemmaBackbone`, transformers' `Gemma2Model`) in these points:

- There is no norm after attention and none after the MLP.
- Every layer of the 1B release attends to the whole context. Sliding-window layers exist for
  configurations whose `layer_types` ask for them.
- The soft caps on attention scores and on logits are options. The 1B release has neither.
- 1,024 positions; as many key-value heads as query heads (4); attention is 1,024 wide in a model
  of width 1,152.

The rest is Gemma's: embeddings tied to the head and scaled by sqrt(D), RMSNorm with 1 + scale,
rotary positions, GeGLU.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import keras_hub

from keras_vaultgemma import backend
from keras_vaultgemma._validation import is_integer
from keras_vaultgemma.layers import kv_cache
from keras_vaultgemma.layers.attention import causal_mask, segment_positions
from keras_vaultgemma.layers.decoder_block import VaultGemmaDecoderBlock
from keras_vaultgemma.layers.direct_call import call_layer
from keras_vaultgemma.layers.hyperparameters import check_hyperparameters
from keras_vaultgemma.layers.initializers import StoredValues
from keras_vaultgemma.layers.reversible_embedding import ReversibleEmbedding
from keras_vaultgemma.layers.rms_norm import RMSNorm
from keras_vaultgemma.layers.rotary import RotaryAngles
from keras_vaultgemma.models.cloning import LayerwiseCloning
from keras_vaultgemma.models.export import Export
from keras_vaultgemma.models.lora_methods import LoraMethods
from keras_vaultgemma.models.preset_io import BackboneIO
from keras_vaultgemma.models.quantization import Quantization
from keras_vaultgemma.models.sharding import LayoutMapMethod


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaBackbone(
    BackboneIO,
    LoraMethods,
    Quantization,
    Export,
    LayerwiseCloning,
    LayoutMapMethod,
    keras_hub.models.Backbone,
):
    """VaultGemma without its language-model head.

    It maps `{"token_ids", "padding_mask"}`, int32 of shape `[B, T]` each, to hidden states of shape
    `[B, T, D]`. `padding_mask` is 1 at tokens and 0 at padding, on either side of the tokens. In
    packed rows, which several documents share, it holds the number of each token's segment instead
    of 1: positions start at 0 in each segment, and its tokens attend to no other. Hidden states at
    padding are finite and meaningless.

    Args:
        vocabulary_size: int. Size V of the vocabulary.
        num_layers: int. Number L of decoder blocks.
        num_query_heads: int. Number N of query heads.
        num_key_value_heads: int. Number K of key-value heads, a divisor of N.
        hidden_dim: int. Width D.
        intermediate_dim: int. Width F of one branch of the gated MLP. (keras-hub's Gemma counts
            both branches together.)
        head_dim: int. Width H of a head; even, and independent of D.
        query_pre_attn_scalar: float. Attention scores are divided by its square root. Defaults to
            `head_dim`.
        attention_logit_soft_cap: float or None. Soft cap on attention scores. Defaults to None.
        final_logit_soft_cap: float or None. Soft cap on the logits, applied by the tied head.
            Defaults to None.
        layer_types: list of L strings, "full_attention" or "sliding_attention". Defaults to full
            attention in every layer.
        sliding_window_size: int or None. Number of positions that a sliding layer attends to, the
            query's own included. Defaults to None.
        rope_theta: float. Base of the rotary wavelengths. Defaults to 10,000.
        layer_norm_epsilon: float. Epsilon of every RMSNorm. Defaults to 1e-6.
        max_sequence_length: int. Number of positions that the model was trained on. Longer input
            warns once and does not fail. Defaults to 1,024.
        initializer_range: float. Standard deviation of the initial projections and embeddings.
            Defaults to 0.02.
        initial_values: dict or None. `{variable path: value}` to start from instead of random
            values, where a value has `shape` and `read(dtype)`. It is not part of the config.
            `from_preset` fills variables this way, because drawing gigabytes of random values
            first would take longer than loading.
        dtype: string or `keras.DTypePolicy`. Dtype of computations and weights.
        **kwargs: `name` and `trainable`.

    Raises:
        ValueError: If an argument is out of its range, or two arguments contradict each other.

    Example:

    ```python
    import numpy as np
    from keras_vaultgemma import VaultGemmaBackbone

    backbone = VaultGemmaBackbone(
        vocabulary_size=256,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        head_dim=16,
    )
    token_ids = np.array([[2, 17, 5, 0]])
    hidden_states = backbone({"token_ids": token_ids, "padding_mask": token_ids > 0})
    ```

    References:
        - [VaultGemma](https://arxiv.org/abs/2510.15001)
        - [Gemma 2](https://arxiv.org/abs/2408.00118)
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        num_key_value_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        head_dim: int,
        query_pre_attn_scalar: float | None = None,
        attention_logit_soft_cap: float | None = None,
        final_logit_soft_cap: float | None = None,
        layer_types: Sequence[str] | None = None,
        sliding_window_size: int | None = None,
        rope_theta: float = 10_000.0,
        layer_norm_epsilon: float = 1e-6,
        max_sequence_length: int = 1024,
        initializer_range: float = 0.02,
        initial_values: Mapping[str, Any] | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if unknown := set(kwargs) - {"name", "trainable"}:
            raise ValueError(f"VaultGemmaBackbone has no argument {', '.join(sorted(unknown))}")
        if layer_types is None and is_integer(num_layers):
            layer_types = ["full_attention"] * num_layers
        arguments = dict(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            head_dim=head_dim,
            query_pre_attn_scalar=head_dim
            if query_pre_attn_scalar is None
            else query_pre_attn_scalar,
            attention_logit_soft_cap=attention_logit_soft_cap,
            final_logit_soft_cap=final_logit_soft_cap,
            layer_types=layer_types,
            sliding_window_size=sliding_window_size,
            rope_theta=rope_theta,
            layer_norm_epsilon=layer_norm_epsilon,
            max_sequence_length=max_sequence_length,
            initializer_range=initializer_range,
        )
        check_hyperparameters(arguments)
        self._hyperparameters = tuple(arguments)
        for name, value in arguments.items():
            setattr(self, name, value)
        self._has_warned_about_length = False

        stored = None if initial_values is None else StoredValues(dict(initial_values))

        def stored_values(name):
            return stored and stored.sublayer(name)

        self.token_embedding = ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=initializer_range),
            logit_soft_cap=final_logit_soft_cap,
            stored_values=stored_values("token_embedding"),
            dtype=dtype,
            name="token_embedding",
        )
        # The scale is rounded to the compute dtype, as in every Gemma: 33.94 is 34 in bfloat16.
        self.embedding_scale = keras.layers.Rescaling(
            math.sqrt(hidden_dim), dtype=dtype, name="embedding_scale"
        )
        self.rotary_angles = RotaryAngles(
            head_dim, rope_theta, dtype="float32", name="rotary_angles"
        )
        self.transformer_layers = [
            VaultGemmaDecoderBlock(
                num_query_heads=num_query_heads,
                num_key_value_heads=num_key_value_heads,
                head_dim=head_dim,
                intermediate_dim=intermediate_dim,
                query_pre_attn_scalar=self.query_pre_attn_scalar,
                attention_logit_soft_cap=attention_logit_soft_cap,
                layer_norm_epsilon=layer_norm_epsilon,
                initializer_range=initializer_range,
                stored_values=stored_values(f"decoder_block_{i}"),
                dtype=dtype,
                name=f"decoder_block_{i}",
            )
            for i in range(num_layers)
        ]
        self.final_norm = RMSNorm(
            layer_norm_epsilon, stored_values("final_norm"), dtype=dtype, name="final_norm"
        )

        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.walk(token_ids, segment_positions(padding_mask), segments=padding_mask),
            dtype=dtype,
            **kwargs,
        )
        if stored and stored.values:
            raise ValueError(
                "`initial_values` must hold values of the backbone's variables alone. "
                f"Received: {', '.join(sorted(stored.values))}"
            )

    def walk(self, token_ids, positions, cache=None, start=None, segments=None, branches=None):
        """Embed tokens, apply every block and normalise.

        Training, scoring, prefill and decoding all use this forward pass.

        Args:
            token_ids: int32 tensor of shape `[B, T]`.
            positions: int32 tensor of shape `[B, T]`. Position of each token in its segment;
                `kv_cache.EMPTY` at padding.
            cache: `KVCache` of S slots, or None. With a cache, the tokens' keys and values are
                written into it and the tokens attend to it; without one, they attend to each other.
                The cache is consumed: use the returned one.
            start: int32 scalar. Slot of the first token. Required with a cache.
            segments: int32 tensor of shape `[B, T]`, or `[B, S]` with a cache, or None. Tokens
                attend only to those with the same number. None if each row is one text.
            branches: int32 tensor like `segments`, or None. Tokens of branch 0 of a segment are
                attended to by all its branches, which do not attend to one another: a text and
                several continuations of it, computed together. None if there are no branches.

        Returns:
            Hidden states of shape `[B, T, D]`; with a cache, a tuple of them and the new cache.
        """
        key_positions = (
            positions if cache is None else kv_cache.write(cache.positions, positions, start)
        )
        windows = {"sliding_attention": self.sliding_window_size}
        masks = {
            kind: causal_mask(
                positions, key_positions, windows.get(kind), segments, start, branches
            )
            for kind in set(self.layer_types)
        }
        if cache is None:
            # By `__call__`, because Keras builds the layers and records the model's graph there.
            angles = self.rotary_angles(positions)
            x = self.embedding_scale(self.token_embedding(token_ids))
            for block, layer_type in zip(self.transformer_layers, self.layer_types, strict=True):
                x = block(x, angles=angles, attention_mask=masks[layer_type])
            return self.final_norm(x)
        angles = call_layer(self.rotary_angles, positions)
        x = call_layer(self.embedding_scale, call_layer(self.token_embedding, token_ids))
        keys, values = [], []
        blocks = backend.trace_once(call_layer, self.transformer_layers)
        for i, (block, layer_type) in enumerate(zip(blocks, self.layer_types, strict=True)):
            layer_cache = (cache.keys[i], cache.values[i])
            x, (key, value) = block(
                x, angles=angles, attention_mask=masks[layer_type], cache=layer_cache, start=start
            )
            keys.append(key)
            values.append(value)
        x = call_layer(self.final_norm, x)
        return x, kv_cache.KVCache(tuple(keys), tuple(values), key_positions)

    @property
    def gradient_checkpointing(self):
        """True if blocks save only their input for the backward pass and recompute the rest."""
        return self.transformer_layers[0].gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value):
        for block in self.transformer_layers:
            block.gradient_checkpointing = bool(value)

    def empty_cache(self, batch, slots):
        """Return an empty `KVCache` of this model's shape for `batch` rows of `slots` slots."""
        return kv_cache.empty_cache(
            self.num_layers,
            batch,
            slots,
            self.num_key_value_heads,
            self.head_dim,
            self.compute_dtype,
        )

    def call(self, inputs, training=None, mask=None):
        self.warn_if_long(backend.known_length(inputs["token_ids"]))
        return super().call(inputs, training=training, mask=mask)

    def warn_if_long(self, length):
        """Warn, once for this backbone, if `length` exceeds the positions it was trained on."""
        if length and length > self.max_sequence_length and not self._has_warned_about_length:
            self._has_warned_about_length = True
            warnings.warn(
                f"The sequence has {length} positions and the model was trained on "
                f"{self.max_sequence_length}; expect worse output beyond them.",
                stacklevel=3,
            )

    def get_config(self):
        hyperparameters = {name: getattr(self, name) for name in self._hyperparameters}
        return {
            **super().get_config(),
            **hyperparameters,
            "layer_types": list(self.layer_types),
        }
