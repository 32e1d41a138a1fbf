"""Prefill: prompts into a KV cache, in chunks of packed rows.

Prompts of a batch that differ in length are mostly padding when each has a row of its own. Where it
is cheaper, several prompts are packed into one row, as in training (Krell et al., 2021,
https://arxiv.org/abs/2107.02027); none attends to another, and their keys and values are then
copied to the rows of a cache. Keys are rotated by positions in their own prompt, so they do not
depend on the packed row.

Chunks have a few lengths and caches a few sizes, so that few functions are compiled for all
lengths.

Shapes: B prompts, P packed rows, T tokens of a chunk, S slots of the cache.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers.kv_cache import EMPTY, gather_slots

CHUNKS = (256, 64, 16)
"""Lengths of chunks, in tokens. Fewer than 16 take as long as 16, the time to read the weights."""

CHUNK_COST = 24
"""Fixed cost of a chunk, in tokens that take as long: the time to read the weights.

On 2 CPU cores, chunks of 16, 64 and 256 tokens take 0.20, 0.49 and 1.67 s on JAX (VaultGemma 1B,
float32). Without it a prompt of 250 tokens takes 36 % longer, as 3 chunks of 64 and 4 of 16.
"""

MIN_CACHE_SLOTS = 256
"""Slots of the smallest cache."""

CACHE_GROWTH, CACHE_GROWTH_OF_BATCH = 4, 2
"""Ratio of one cache size to the next, for one row and for several.

Batches grow in smaller steps, because attention to empty slots takes a larger part of their time.
"""


class Prefill:
    """Compiled prefill of one model.

    Args:
        model: has `backbone`.
        compile: function like `backend.compile_function` for the model's variables.
    """

    def __init__(self, model, compile):
        self._backbone = model.backbone
        self._empty = compile(self._empty_state)
        # Matmuls of many rows are no faster in XLA.
        self._read_chunk = compile(self._read, donate=(4, 5), jit_compile=False)
        self._unpack = compile(gather_slots)

    def __call__(self, rows, capacity):
        """Read prompts into a new cache.

        Args:
            rows: list of B lists of token ids.
            capacity: int. Number of tokens that the cache must hold beyond the longest prompt.

        Returns:
            Tuple `(hidden, cache, start)`: the hidden state [B, D] of each prompt's last token, the
            `KVCache` of B rows, and the first slot after the longest prompt, an int.
        """
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        needed = max(longest + capacity, sum(chunk_lengths(longest, len(rows))))
        slots = cache_slots(needed, len(rows))
        packing = pack_prompts(lengths, slots)
        packed = _pack(rows, packing, slots)
        hidden, cache = self._empty(
            *(backend.as_argument(np.zeros(n, "int8")) for n in (len(rows), (len(packing), slots)))
        )
        segments, last_tokens, start = _int(packed.segments), _int(packed.last_tokens), 0
        for length in chunk_lengths(
            max(sum(lengths[i] for i in row) for row in packing), len(packing)
        ):
            part = slice(start, start + length)
            chunk = _int(packed.token_ids[:, part]), _int(packed.positions[:, part])
            hidden, cache = self._read_chunk(
                chunk, segments, last_tokens, _int(start), hidden, cache
            )
            start += length
        if len(packing) < len(rows):
            slot, length = np.arange(slots)[None], np.array(lengths)[:, None]
            is_token = slot < length
            source = np.where(is_token, packed.last_tokens[:, 1:] + 1 - length + slot, 0)
            positions = np.where(is_token, slot, EMPTY)
            cache = self._unpack(
                cache, _int(packed.last_tokens[:, 0]), _int(source), _int(positions)
            )
        return hidden, cache, longest

    def _empty_state(self, rows, packed_rows):
        """Return hidden states [B, D] and an empty cache of P rows and S slots.

        Args:
            rows: tensor [B]. Only its shape is read.
            packed_rows: tensor [P, S]. Only its shape is read.
        """
        hidden = ops.zeros((rows.shape[0], self._backbone.hidden_dim), self._backbone.compute_dtype)
        return hidden, self._backbone.empty_cache(*packed_rows.shape)

    def _read(self, chunk, segments, last_tokens, start, hidden, cache):
        """Read one chunk of the packed rows into slots `start` to `start + T` of the cache.

        Args:
            chunk: tuple of token ids and positions, int32 [P, T] each.
            segments: int32 [P, S]. Index of the prompt in its packed row, for each slot.
            last_tokens: int32 [B, 2]. Packed row and slot of each prompt's last token.
            start: int32 scalar.
            hidden: float [B, D]. Hidden states of the last tokens in earlier chunks.
            cache: `KVCache` of P rows.

        Returns:
            Tuple `(hidden, cache)`, both updated.
        """
        token_ids, positions = chunk
        states, cache = self._backbone.walk(
            token_ids, positions, cache=cache, start=start, segments=segments
        )
        length, offset = token_ids.shape[1], last_tokens[:, 1] - start
        index = last_tokens[:, 0] * length + ops.clip(offset, 0, length - 1)
        found = ops.take(ops.reshape(states, (-1, states.shape[-1])), index, axis=0)
        is_here = ops.logical_and(offset >= 0, offset < length)
        return ops.where(is_here[:, None], found, hidden), cache


class _PackedRows(NamedTuple):
    """Prompts in packed rows: NumPy arrays.

    Attributes:
        token_ids, positions: int32 [P, S], 0 and `EMPTY` at padding.
        segments: int32 [P, S]. Index of the prompt in its packed row.
        last_tokens: int32 [B, 2]. Packed row and slot of each prompt's last token.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    last_tokens: np.ndarray


def _pack(rows, packing, slots):
    shape = (len(packing), slots)
    token_ids, segments = np.zeros(shape, "int32"), np.zeros(shape, "int32")
    positions, last_tokens = np.full(shape, EMPTY, "int32"), np.zeros((len(rows), 2), "int32")
    for number, members in enumerate(packing):
        start = 0
        for segment, i in enumerate(members):
            part = slice(start, start + len(rows[i]))
            token_ids[number, part], positions[number, part] = rows[i], np.arange(len(rows[i]))
            segments[number, part] = segment
            start = part.stop
            last_tokens[i] = number, start - 1
    return _PackedRows(token_ids, positions, segments, last_tokens)


def chunk_lengths(length, rows=1):
    """Return the lengths of the cheapest chunks for `rows` rows of `length` tokens."""
    return _cheapest_chunks(int(length), rows, CHUNKS)


def _cheapest_chunks(length, rows, kinds):
    kind, *smaller = kinds
    padded = [kind] * -(-length // kind)
    if not smaller:
        return padded
    closer = [kind] * (length // kind) + _cheapest_chunks(length % kind, rows, smaller)
    return min(closer, padded, key=lambda chunks: _cost(chunks, rows))


def _cost(chunks, rows):
    return sum(rows * length + CHUNK_COST for length in chunks)


def prefill_cost(rows, length):
    """Return the cost of prefilling `rows` rows of `length` tokens, in tokens that take as long."""
    return _cost(chunk_lengths(length, rows), rows)


def pack_prompts(lengths, slots):
    """Choose which prompts share a packed row, at the lowest cost.

    There are as many packed rows as prompts, or a power of two, so that few functions are compiled.

    Args:
        lengths: list of ints. Length of each prompt, at most `slots`.
        slots: int. Capacity of a packed row in tokens.

    Returns:
        List of lists of indices of prompts, one list for each packed row.
    """
    best, count = [[i] for i in range(len(lengths))], 1
    cost = prefill_cost(len(lengths), max(lengths))
    while count < len(lengths):
        packing, filled = [[] for _ in range(count)], [0] * count
        # Longest first, each into the emptiest row, so that rows become about equally long.
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = filled.index(min(filled))
            packing[row].append(i)
            filled[row] += lengths[i]
        longest = max(filled)
        if sum(chunk_lengths(longest, count)) <= slots and prefill_cost(count, longest) < cost:
            best, cost = packing, prefill_cost(count, longest)
        count *= 2
    return best


def cache_slots(needed, rows):
    """Return the smallest cache size of `rows` rows that has `needed` slots."""
    slots = MIN_CACHE_SLOTS
    while slots < needed:
        slots *= CACHE_GROWTH_OF_BATCH if rows > 1 else CACHE_GROWTH
    return slots


def _int(x):
    return backend.as_argument(np.asarray(x, "int32"))
