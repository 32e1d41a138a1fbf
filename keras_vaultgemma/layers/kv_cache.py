"""The key-value cache: a plain record, passed in and returned, owned by whoever decodes.

A slot is a place in the cache, a position is a place in a row's text. They differ where rows of a batch have prompts of
different lengths: all rows write the same slot, each at its own position. The cache therefore remembers the position in
every slot, and the attention mask follows from positions alone.
"""

from typing import NamedTuple

from keras import ops

from keras_vaultgemma import backend

EMPTY = -1
"""The position of a slot that holds nothing to attend to: unwritten, or padding."""


class KVCache(NamedTuple):
    """Keys and values of S slots.

    Attributes:
        keys, values: one [B * K, S, H] tensor for each layer, in the compute dtype. Keys are rotated already. Rows and
            heads are one dimension, as matrix products want them: XLA would otherwise write each token once for the
            product and once for the cache, and copy both caches for that.
        positions: int32 [B, S], `EMPTY` where a slot holds nothing.
    """

    keys: tuple
    values: tuple
    positions: object


def empty_cache(num_layers, batch, slots, num_key_value_heads, head_dim, dtype):
    """A cache of `slots` empty slots; 2 * L * B * S * K * H values."""
    shape = (batch * num_key_value_heads, slots, head_dim)
    return KVCache(
        keys=tuple(ops.zeros(shape, dtype) for _ in range(num_layers)),
        values=tuple(ops.zeros(shape, dtype) for _ in range(num_layers)),
        positions=ops.full((batch, slots), EMPTY, dtype="int32"),
    )


def write(buffer, update, start):
    """Write `update` into slots `start` to `start + T` of `buffer`, which is consumed.

    Args:
        buffer, update: [any, S, ...] and [any, T, ...].
    """
    return backend.write_slice(buffer, ops.cast(update, buffer.dtype), start)


def split_heads(cache):
    """The cache with keys and values [B, K, S, H], for those who rearrange rows; `of_rows` is the way back."""
    return _reshaped(cache, lambda shape: (cache.positions.shape[0], -1, *shape[1:]))


def merge_heads(cache):
    """The cache that `by_row` made ready for rearranging."""
    return _reshaped(cache, lambda shape: (-1, *shape[2:]))


def _reshaped(cache, new_shape):
    keys, values = (
        tuple(ops.reshape(x, new_shape(x.shape)) for x in tensors) for tensors in cache[:2]
    )
    return KVCache(keys, values, cache.positions)
