"""Causal attention: the mask and the arithmetic as pure functions, and the layer that owns the four projections.

Shapes: B batch, T query length, S key length, D width, N query heads, K key-value heads, G = N / K, H head width.
"""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers import kv_cache
from keras_vaultgemma.layers.projection import projection
from keras_vaultgemma.layers.rotary import rotate
from keras_vaultgemma.layers.soft_cap import soft_cap


def causal_mask(query_positions, key_positions, window=None, segments=None, start=None):
    """Which key each query sees: those not after it, not empty, less than `window` positions back, of its own segment.

    Args:
        query_positions: int [B, T].
        key_positions: int [B, S]; `cache.EMPTY` marks padding and unwritten slots.
        window: number of positions seen, the query's own included, int or int scalar; None for all.
        segments: int [B, S], the segment of each key; None where a row is one text.
        start: int scalar, the key that is the first query; None where S = T.

    Returns:
        bool [B, T, S].
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = ops.logical_and(distance >= 0, key_positions[:, None, :] > kv_cache.EMPTY)
    if segments is not None:
        seen = ops.logical_and(seen, _same_segment(segments, start, query_positions.shape[1]))
    return seen if window is None else ops.logical_and(seen, distance < window)


def segment_positions(padding_mask):
    """Positions of the tokens in their segments: int32 [B, T], each counted from 0, `cache.EMPTY` at padding.

    Args:
        padding_mask: int or bool [B, T], the number of each token's segment, 0 at padding. A row that is one text has 1
            at every token; padding may stand on either side.
    """
    segments = ops.cast(padding_mask, "int32")
    counted = ops.sum(ops.cast(ops.tril(_same_segment(segments)), "int32"), axis=-1) - 1
    return ops.where(segments > 0, counted, kv_cache.EMPTY)


def _same_segment(segments, start=None, length=None):
    """bool [B, T, S]: which of `length` tokens from `start` on, or of all, are of one segment with which of all."""
    queries = (
        segments if start is None else ops.slice(segments, (0, start), (segments.shape[0], length))
    )
    return ops.equal(queries[:, :, None], segments[:, None, :])


def attend(query, key, value, mask, scale, cap=None):
    """Grouped-query attention with an optional soft cap on the scores, softmax in float32.

    Keys and values have heads before slots: a query then reads those of its head as they lie in memory, at the speed of
    memory for a single query. (With slots before heads, XLA's CPU compiler has them transposed for every token.)

    Args:
        query: [B, T, N, H]; query head n reads key-value head n // G.
        key, value: [B, K, S, H], or [B * K, S, H] as a cache has them.
        mask: bool [B, T, S].
        scale: factor on the scores.
        cap: soft cap on the scaled scores, or None.

    Returns:
        [B, T, N, H]. A query that sees no key gets the mean of all values: finite, and masked wherever it matters.
    """
    batch, length, num_query_heads, head_dim = ops.shape(query)
    *lead, slots, _ = ops.shape(key)
    heads = key.shape[1] if len(lead) == 2 else key.shape[0] // query.shape[0]
    groups = num_query_heads // heads
    if backend.ATTENDS_IN_ONE and groups == 1 and cap is None:
        key, value = (
            ops.transpose(ops.reshape(x, (batch, heads, slots, -1)), (0, 2, 1, 3))
            for x in (key, value)
        )
        return ops.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale)
    # A matrix times a vector where a head has one query: XLA's CPU compiler takes 10 times as long over one row of a
    # matrix.
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
    # Finite, so that a row without any key does not turn into NaN.
    scores = ops.where(mask[:, None, None], scores, -1e30)
    weights = ops.cast(ops.softmax(scores, axis=-1), value.dtype)
    output = ops.einsum(
        f"{b}{r}s,{b}sh->{b}{r}h", ops.reshape(weights, (*lead, *rows, slots)), value
    )
    output = ops.transpose(
        ops.reshape(output, (batch, heads, groups, length, head_dim)), (0, 3, 1, 2, 4)
    )
    return ops.reshape(output, (batch, length, num_query_heads, head_dim))


class VaultGemmaAttention(keras.layers.Layer):
    """The query, key, value and output projections around `attend`.

    Args:
        num_query_heads, num_key_value_heads, head_dim: N, K, H.
        query_pre_attn_scalar: the scores are divided by its square root.
        logit_soft_cap: soft cap on the scores, or None.
        initial: `layers.Initial` of this layer.
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        query_pre_attn_scalar,
        logit_soft_cap,
        initial,
        **kwargs,
    ):
        # Keras would cast the angles to a 16-bit compute dtype on the way in.
        super().__init__(autocast=False, **kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.query_pre_attn_scalar = query_pre_attn_scalar
        self.logit_soft_cap = logit_soft_cap
        self.initial = initial

    def build(self, input_shape):
        width, options = input_shape[-1], (self.initial, self.dtype_policy)
        self.query = projection(self.num_query_heads * self.head_dim, "query", *options)
        self.key = projection(self.num_key_value_heads * self.head_dim, "key", *options)
        self.value = projection(self.num_key_value_heads * self.head_dim, "value", *options)
        # `output` is a property of every Keras layer.
        self.attention_output = projection(width, "attention_output", *options)
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        self.attention_output.build((*input_shape[:-1], self.num_query_heads * self.head_dim))

    def call(
        self, x, angles, attention_mask, cache=None, start=None, training=None, recompute=True
    ):
        """Attend from `x` to itself, or to a cache that `x` is first written into.

        Args:
            x: [B, T, D].
            angles: (cos, sin) of the queries' positions, from `layers.RotaryAngles`.
            attention_mask: bool [B, T, S]; S = T without a cache.
            cache: (keys, values) of this layer, [B * K, S, H] each, or None; consumed.
            start: int32 scalar, the first slot to write.
            training: whether adapters drop out.
            recompute: whether scores and weights (N T S values each) are computed again for the backward pass rather
                than kept. Without a cache only, which is when gradients are taken.

        Returns:
            [B, T, D]; with a cache, a pair of that and the new (keys, values).
        """
        batch, length, _ = ops.shape(x)
        query = ops.reshape(
            self.query(x, training=training), (batch, length, self.num_query_heads, self.head_dim)
        )
        key = ops.reshape(
            self.key(x, training=training), (batch, length, self.num_key_value_heads, self.head_dim)
        )
        value = ops.reshape(
            self.value(x, training=training),
            (batch, length, self.num_key_value_heads, self.head_dim),
        )
        query, key = rotate(query, *angles), rotate(key, *angles)
        key, value = ops.transpose(key, (0, 2, 1, 3)), ops.transpose(value, (0, 2, 1, 3))
        if cache is not None:
            key, value = (
                kv_cache.write(old, ops.reshape(new, (-1, length, self.head_dim)), start)
                for old, new in zip(cache, (key, value), strict=True)
            )
        attend_to = self._attend_to(attention_mask)
        output = (backend.remat(attend_to) if cache is None and recompute else attend_to)(
            query, key, value
        )
        output = ops.reshape(output, (batch, length, self.num_query_heads * self.head_dim))
        output = self.attention_output(output, training=training)
        return output if cache is None else (output, (key, value))

    def _attend_to(self, mask):
        def attend_to(query, key, value):
            return attend(
                query, key, value, mask, self.query_pre_attn_scalar**-0.5, self.logit_soft_cap
            )

        return attend_to
