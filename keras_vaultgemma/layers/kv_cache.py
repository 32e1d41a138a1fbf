"""The key-value cache: a record that is passed in and returned.

A slot is an index into the cache, a position is an index into the text of a row. They differ where
prompts of a batch have different lengths: all rows write the same slot, each at its own position.
The cache therefore stores the position of every slot, and the attention mask follows from positions
alone.
"""

from typing import NamedTuple

from keras import ops

from keras_vaultgemma import backend

EMPTY = -1
"""Position of a slot that no query attends to, because it is unwritten or padding."""


class KVCache(NamedTuple):
    """Keys and values of S slots in each layer.

    Attributes:
        keys: tuple of L tensors [B * K, S, H] in the compute dtype, rotated. Rows and heads are one
            axis, as matmuls need them: XLA would otherwise write each token twice, for the matmul
            and for the cache, and copy both caches.
        values: tuple of L tensors [B * K, S, H].
        positions: int32 [B, S], `EMPTY` where a slot holds nothing.
    """

    keys: tuple
    values: tuple
    positions: object


def empty_cache(num_layers, batch, slots, num_key_value_heads, head_dim, dtype):
    """Return a `KVCache` of empty slots, which holds 2 * L * B * S * K * H values."""
    shape = (batch * num_key_value_heads, slots, head_dim)
    return KVCache(
        keys=tuple(ops.zeros(shape, dtype) for _ in range(num_layers)),
        values=tuple(ops.zeros(shape, dtype) for _ in range(num_layers)),
        positions=ops.full((batch, slots), EMPTY, dtype="int32"),
    )


def write(buffer, update, start):
    """Write `update` into slots `start` to `start + T` of `buffer`, and return the result.

    Args:
        buffer: tensor [N, S, ...]. The caller must not use it again.
        update: tensor [N, T, ...].
        start: int32 scalar.
    """
    return backend.write_slice(buffer, ops.cast(update, buffer.dtype), start)


def take_rows(cache, rows):
    """Return a cache whose row i is row `rows[i]` of `cache`.

    Args:
        cache: `KVCache` of B rows.
        rows: int32 [N].
    """
    heads = cache.keys[0].shape[0] // cache.positions.shape[0]
    index = ops.reshape(rows[:, None] * heads + ops.arange(heads, dtype="int32"), (-1,))
    keys, values = (tuple(ops.take(x, index, axis=0) for x in tensors) for tensors in cache[:2])
    return KVCache(keys, values, ops.take(cache.positions, rows, axis=0))


def split_heads(cache):
    """Return the cache with keys and values [B, K, S, H], for samplers that reorder rows."""
    return _reshape(cache, lambda shape: (cache.positions.shape[0], -1, *shape[1:]))


def merge_heads(cache):
    """Undo `split_heads`."""
    return _reshape(cache, lambda shape: (-1, *shape[2:]))


def _reshape(cache, new_shape):
    keys, values = (
        tuple(ops.reshape(x, new_shape(x.shape)) for x in tensors) for tensors in cache[:2]
    )
    return KVCache(keys, values, cache.positions)
