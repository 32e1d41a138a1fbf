"""Causal attention: mask and arithmetic as pure functions, and the layer with the projections.

Shapes: B batch, T query length, S key length, D width, N query heads, K key-value heads, G = N / K
query heads in a group, H head width.
"""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers import kv_cache
from keras_vaultgemma.layers.direct_call import call_layer
from keras_vaultgemma.layers.projection import Projection
from keras_vaultgemma.layers.rotary import rotate
from keras_vaultgemma.layers.soft_cap import soft_cap


def causal_mask(
    query_positions, key_positions, window=None, segments=None, start=None, branches=None
):
    """Return the mask of the keys that each query attends to.

    These are the keys of its own segment that are not after it, not empty, and less than `window`
    positions before it; with branches, those of its own branch or of none.

    Args:
        query_positions: int tensor [B, T].
        key_positions: int tensor [B, S]. `kv_cache.EMPTY` at padding and unwritten slots.
        window: int or int scalar. Number of positions attended to, the query's own included.
            Defaults to None, for all.
        segments: int tensor [B, S]. Segment of each key. Defaults to None, where each row is one
            text.
        start: int scalar. Index of the key that is the first query. Defaults to None, where S = T.
        branches: int tensor [B, S]. Branch of each key, of several that continue one text; 0 in the
            text itself, which every branch attends to. Defaults to None, for no branches.

    Returns:
        bool tensor [B, T, S].
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = ops.logical_and(distance >= 0, key_positions[:, None, :] > kv_cache.EMPTY)
    if segments is not None:
        mask = ops.logical_and(mask, _same_segment(segments, start, query_positions.shape[1]))
    if branches is not None:
        is_same = _same_segment(branches, start, query_positions.shape[1])
        mask = ops.logical_and(mask, ops.logical_or(is_same, branches[:, None, :] == 0))
    return mask if window is None else ops.logical_and(mask, distance < window)


def segment_positions(padding_mask):
    """Return the position of each token in its segment, counted from 0.

    Args:
        padding_mask: int or bool tensor [B, T]. Number of each token's segment, 0 at padding. A row
            that is one text has 1 at every token; padding may be on either side.

    Returns:
        int32 tensor [B, T], `kv_cache.EMPTY` at padding.
    """
    segments = ops.cast(padding_mask, "int32")
    positions = ops.sum(ops.cast(ops.tril(_same_segment(segments)), "int32"), axis=-1) - 1
    return ops.where(segments > 0, positions, kv_cache.EMPTY)


def _same_segment(segments, start=None, length=None):
    """Return bool [B, T, S]: True where a query and a key are of one segment.

    The queries are `length` tokens from `start` on, or all tokens.
    """
    if start is None:
        queries = segments
    else:  # `start * 0`, because JAX with 64-bit integers needs indices of one dtype
        queries = ops.slice(segments, (start * 0, start), (segments.shape[0], length))
    return ops.equal(queries[:, :, None], segments[:, None, :])


def attend(query, key, value, mask, scale, cap=None, heads=None):
    """Compute grouped-query attention with softmax in float32.

    Keys and values have heads before slots, so that a query reads those of its head consecutively:
    at the speed of memory for a single query. With slots before heads, XLA's CPU compiler
    transposes them for every token.

    Args:
        query: tensor [B, T, N, H]. Query head n reads key-value head n // G.
        key: tensor [B, K, S, H], or [B * K, S, H] from a cache.
        value: tensor like `key`.
        mask: bool tensor [B, T, S].
        scale: float. Factor of the scores.
        cap: float. Soft cap of the scaled scores. Defaults to None.
        heads: int K, which the shapes of a cache do not tell in a graph of any batch. Defaults to
            None, for what they tell.

    Returns:
        Tensor [B, T, N, H]. A query whose mask is False everywhere gets a finite value that has no
        meaning.
    """
    batch, length, num_query_heads, head_dim = ops.shape(query)
    *lead, slots, _ = ops.shape(key)
    if heads is None:
        heads = key.shape[1] if len(lead) == 2 else key.shape[0] // query.shape[0]
    groups = num_query_heads // heads
    if is_fused(groups, cap):
        key, value = (backend.reshape(x, (batch, heads, slots, head_dim)) for x in (key, value))
        query = ops.transpose(query, (0, 2, 1, 3))
        output = backend.fused_attention(query, key, value, mask[:, None], scale)
        return ops.transpose(output, (0, 2, 1, 3))
    # A matrix times a vector if a head has a single query, because XLA's CPU compiler takes 10
    # times as long for a matrix of one row.
    rows, r = ((), "") if query.shape[1] == groups == 1 else ((groups * length,), "r")
    query = ops.transpose(
        ops.reshape(query, (batch, length, heads, groups, head_dim)), (0, 2, 3, 1, 4)
    )
    b = "bk"[: len(lead)]
    scores = ops.einsum(
        f"{b}{r}h,{b}sh->{b}{r}s", ops.reshape(query, (*lead, *rows, head_dim)), key
    )
    scores = soft_cap(ops.cast(scores, "float32") * scale, cap)
    scores = ops.reshape(scores, (batch, heads, groups, length, slots))
    # Finite, because a row of -inf alone would become NaN.
    scores = ops.where(mask[:, None, None], scores, -1e30)
    weights = ops.cast(ops.softmax(scores, axis=-1), value.dtype)
    output = ops.einsum(
        f"{b}{r}s,{b}sh->{b}{r}h", ops.reshape(weights, (*lead, *rows, slots)), value
    )
    output = ops.transpose(
        ops.reshape(output, (batch, heads, groups, length, head_dim)), (0, 3, 1, 2, 4)
    )
    return ops.reshape(output, (batch, length, num_query_heads, head_dim))


def is_fused(groups, cap):
    """True if `attend` is one operation, which saves no scores for the backward pass (PyTorch)."""
    return backend.HAS_FUSED_ATTENTION and groups == 1 and cap is None


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaAttention(keras.layers.Layer):
    """Causal self-attention with rotary positions, optionally to a KV cache.

    Args:
        num_query_heads: int. N.
        num_key_value_heads: int. K, a divisor of N.
        head_dim: int. H.
        query_pre_attn_scalar: float. Scores are divided by its square root. Defaults to `head_dim`.
        logit_soft_cap: float. Soft cap of the scores. Defaults to None.
        initializer_range: float. Standard deviation of random initial weights. Defaults to 0.02.
        stored_values: `StoredValues` of this layer. Not part of the config. Defaults to None, for
            random values.

    Example:

    ```python
    from keras import ops
    from keras_vaultgemma.layers.attention import VaultGemmaAttention, causal_mask
    from keras_vaultgemma.layers.rotary import RotaryAngles

    positions = ops.arange(3)[None]
    attention = VaultGemmaAttention(num_query_heads=2, num_key_value_heads=1, head_dim=4)
    y = attention(
        ops.ones((1, 3, 8)),
        angles=RotaryAngles(4, 10_000.0)(positions),
        attention_mask=causal_mask(positions, positions),
    )
    ```
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        query_pre_attn_scalar=None,
        logit_soft_cap=None,
        initializer_range=0.02,
        stored_values=None,
        **kwargs,
    ):
        # Without autocast, which would cast the angles to a 16-bit compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.query_pre_attn_scalar = query_pre_attn_scalar or head_dim
        self.logit_soft_cap = logit_soft_cap
        self.initializer_range = initializer_range
        self._stored_values = stored_values

    def build(self, input_shape):
        query_width = self.num_query_heads * self.head_dim
        key_width = self.num_key_value_heads * self.head_dim
        self.query = self._projection("query", query_width)
        self.key = self._projection("key", key_width)
        self.value = self._projection("value", key_width)
        # Not `output`, which is a property of every Keras layer.
        self.attention_output = self._projection("attention_output", input_shape[-1])
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        self.attention_output.build((*input_shape[:-1], query_width))

    def _projection(self, name, units):
        stored = self._stored_values and self._stored_values.sublayer(name)
        return Projection(units, self.initializer_range, stored, dtype=self.dtype_policy, name=name)

    def call(
        self, x, angles, attention_mask, cache=None, start=None, training=None, recompute=True
    ):
        """Attend from `x` to itself, or to a cache that `x` is first written into.

        Args:
            x: tensor [B, T, D].
            angles: tuple `(cos, sin)` of the queries' positions, from `RotaryAngles`.
            attention_mask: bool tensor [B, T, S], with S = T without a cache.
            cache: tuple `(keys, values)` of this layer, tensors [B * K, S, H], which the caller
                must not use again. Defaults to None.
            start: int32 scalar. First slot to write. Only with a cache.
            training: bool. True to apply the dropout of adapters.
            recompute: bool. True to recompute scores and weights (N T S values each) in the
                backward pass instead of saving them. Only without a cache. Defaults to True.

        Returns:
            Tensor [B, T, D]; with a cache, a tuple of it and the new `(keys, values)`.
        """
        batch, length, _ = ops.shape(x)

        def project(layer, heads):
            y = call_layer(layer, x, training=training)
            return backend.reshape(y, (batch, length, heads, self.head_dim))

        query = rotate(project(self.query, self.num_query_heads), *angles)
        key = rotate(project(self.key, self.num_key_value_heads), *angles)
        value = project(self.value, self.num_key_value_heads)
        key, value = ops.transpose(key, (0, 2, 1, 3)), ops.transpose(value, (0, 2, 1, 3))
        if cache is not None:
            key, value = (
                kv_cache.write(old, backend.reshape(new, (-1, length, self.head_dim)), start)
                for old, new in zip(cache, (key, value), strict=True)
            )

        def attend_to(query, key, value):
            scale = self.query_pre_attn_scalar**-0.5
            cap, heads = self.logit_soft_cap, self.num_key_value_heads
            return attend(query, key, value, attention_mask, scale, cap, heads)

        groups = self.num_query_heads // self.num_key_value_heads
        if cache is None and recompute and not is_fused(groups, self.logit_soft_cap):
            attend_to = backend.remat(attend_to)
        output = attend_to(query, key, value)
        output = backend.reshape(output, (batch, length, self.num_query_heads * self.head_dim))
        output = call_layer(self.attention_output, output, training=training)
        return output if cache is None else (output, (key, value))

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "logit_soft_cap": self.logit_soft_cap,
            "initializer_range": self.initializer_range,
        }
