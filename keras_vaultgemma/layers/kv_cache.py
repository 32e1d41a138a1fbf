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
    index = ops.reshape(_heads_of(cache, rows), (-1,))
    keys, values = (tuple(ops.take(x, index, axis=0) for x in tensors) for tensors in cache[:2])
    return KVCache(keys, values, ops.take(cache.positions, rows, axis=0))


def gather_slots(cache, rows, source, positions):
    """Return a cache whose rows and slots are copied from those of another one.

    Args:
        cache: `KVCache` of P rows.
        rows: int32 [B]. The row of `cache` that each new row is copied from.
        source: int32 [B, S]. The slot of that row that each new slot is copied from.
        positions: int32 [B, S]. Positions of the new cache.
    """
    _, slots, head_dim = cache.keys[0].shape
    index = ops.reshape(
        _heads_of(cache, rows)[:, :, None] * slots + source[:, None], (-1, source.shape[1])
    )

    def gather(tensor):
        return ops.take(ops.reshape(tensor, (-1, head_dim)), index, axis=0)

    return KVCache(tuple(map(gather, cache.keys)), tuple(map(gather, cache.values)), positions)


def write_rows(cache, new, rows):
    """Return the cache with other rows in place of some.

    Args:
        cache: `KVCache` of B rows and S slots. The caller must not use it again.
        new: `KVCache` of N rows and S slots.
        rows: int32 [N]. The row of `cache` that each row of `new` replaces.
    """
    heads = ops.reshape(_heads_of(cache, rows), (-1,))
    keys, values = (
        tuple(backend.write_rows(x, y, heads) for x, y in zip(*tensors, strict=True))
        for tensors in ((cache.keys, new.keys), (cache.values, new.values))
    )
    return KVCache(keys, values, backend.write_rows(cache.positions, new.positions, rows))


def _heads_of(cache, rows):
    """Return the indices [N, K] of the heads of `rows` in the first axis of keys and values."""
    heads = cache.keys[0].shape[0] // cache.positions.shape[0]
    return rows[:, None] * heads + ops.arange(heads, dtype="int32")


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
