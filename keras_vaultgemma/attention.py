"""Causal attention: the mask and the arithmetic as pure functions, and the layer that owns the four projections.

Shapes: B batch, T query length, S key length, D width, N query heads, K key-value heads, G = N / K, H head width.
"""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma import cache as kv
from keras_vaultgemma.layers import projection, rotate, soft_cap


def causal_mask(query_positions, key_positions, window=None, segments=None):
    """Which key each query sees: those not after it, not empty, less than `window` positions back, of its own segment.

    Args:
        query_positions: int [B, T].
        key_positions: int [B, S]; `cache.EMPTY` marks padding and unwritten slots.
        window: number of positions seen, the query's own included; None for all.
        segments: int [B, T], the segment of each token where S = T; None where a row is one text.

    Returns:
        bool [B, T, S].
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = ops.logical_and(distance >= 0, key_positions[:, None, :] > kv.EMPTY)
    if segments is not None:
        seen = ops.logical_and(seen, _same(segments))
    return seen if window is None else ops.logical_and(seen, distance < window)


def positions_of(padding_mask):
    """Positions of the tokens in their segments: int32 [B, T], each counted from 0, `cache.EMPTY` at padding.

    Args:
        padding_mask: int or bool [B, T], the number of each token's segment, 0 at padding. A row that is one text has 1
            at every token; padding may stand on either side.
    """
    segments = ops.cast(padding_mask, "int32")
    counted = ops.sum(ops.cast(ops.tril(_same(segments)), "int32"), axis=-1) - 1
    return ops.where(segments > 0, counted, kv.EMPTY)


def _same(segments):
    """bool [B, T, T]: which pairs of tokens are of one segment."""
    return ops.equal(segments[:, :, None], segments[:, None, :])


def attend(query, key, value, mask, scale, cap=None):
    """Grouped-query attention with an optional soft cap on the scores, softmax in float32.

    Args:
        query: [B, T, N, H]; query head n reads key-value head n // G.
        key, value: [B, S, K, H].
        mask: bool [B, T, S].
        scale: factor on the scores.
        cap: soft cap on the scaled scores, or None.

    Returns:
        [B, T, N, H]. A query that sees no key gets the mean of all values: finite, and masked wherever it matters.
    """
    batch, length, num_query_heads, head_dim = ops.shape(query)
    groups = num_query_heads // key.shape[2]
    query = ops.reshape(query, (batch, length, key.shape[2], groups, head_dim))
    scores = ops.einsum("btkgh,bskh->bkgts", query, key)
    scores = soft_cap(ops.cast(scores, "float32") * scale, cap)
    # Finite, so that a row without any key does not turn into NaN.
    scores = ops.where(mask[:, None, None], scores, -1e30)
    weights = ops.cast(ops.softmax(scores, axis=-1), value.dtype)
    output = ops.einsum("bkgts,bskh->btkgh", weights, value)
    return ops.reshape(output, (batch, length, num_query_heads, head_dim))


def attend_once(query, key, value, mask, scale, cap=None):
    """`attend` for a single query a row, T = 1.

    The heads' queries stand in a matrix [N, K H], each in the columns of its own key-value head and with zeros in the
    others. So keys and values are read once and as they lie in memory, all heads of a slot together, where `attend` has
    them transposed first. That is K times the multiplications, and 6 to 10 times the speed on JAX's CPU.
    """
    batch, _, num_query_heads, head_dim = ops.shape(query)
    slots, heads = key.shape[1:3]
    own = ops.eye(heads, dtype=query.dtype)[None, :, None, :, None]
    query = ops.reshape(query, (batch, heads, num_query_heads // heads, 1, head_dim)) * own
    query = ops.reshape(query, (batch, num_query_heads, heads * head_dim))
    key, value = (ops.reshape(x, (batch, slots, heads * head_dim)) for x in (key, value))
    scores = ops.matmul(query, ops.transpose(key, (0, 2, 1)))
    scores = ops.where(mask, soft_cap(ops.cast(scores, "float32") * scale, cap), -1e30)
    weights = ops.cast(ops.softmax(scores, axis=-1), value.dtype)
    output = ops.reshape(ops.matmul(weights, value), (batch, heads, -1, heads, head_dim))
    return ops.reshape(ops.sum(output * own, axis=3), (batch, 1, num_query_heads, head_dim))


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

    def call(self, x, angles, attention_mask, cache=None, start=None, training=None, recompute=True):
        """Attend from `x` to itself, or to a cache that `x` is first written into.

        Args:
            x: [B, T, D].
            angles: (cos, sin) of the queries' positions, from `layers.RotaryAngles`.
            attention_mask: bool [B, T, S]; S = T without a cache.
            cache: (keys, values) of this layer, [B, S, K, H] each, or None; consumed.
            start: int32 scalar, the first slot to write.
            training: whether adapters drop out.
            recompute: whether scores and weights (N T S values each) are computed again for the backward pass rather
                than kept. Without a cache only, which is when gradients are taken.

        Returns:
            [B, T, D]; with a cache, a pair of that and the new (keys, values).
        """
        batch, length, _ = ops.shape(x)
        query = ops.reshape(self.query(x, training=training), (batch, length, self.num_query_heads, self.head_dim))
        key = ops.reshape(self.key(x, training=training), (batch, length, self.num_key_value_heads, self.head_dim))
        value = ops.reshape(self.value(x, training=training), (batch, length, self.num_key_value_heads, self.head_dim))
        query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:
            key, value = kv.write(cache[0], key, start), kv.write(cache[1], value, start)
        attend_to = self._attend_to(attention_mask)
        output = (backend.recomputed(attend_to) if cache is None and recompute else attend_to)(query, key, value)
        output = ops.reshape(output, (batch, length, self.num_query_heads * self.head_dim))
        output = self.attention_output(output, training=training)
        return output if cache is None else (output, (key, value))

    def _attend_to(self, mask):
        def attend_to(query, key, value):
            function = attend_once if query.shape[1] == 1 else attend
            return function(query, key, value, mask, self.query_pre_attn_scalar**-0.5, self.logit_soft_cap)

        return attend_to
