"""Prompts into a cache: on which lines they are read, in which chunks, and where their rows end up.

Prompts of a batch that differ in length are mostly padding when each has a line of its own. Where that costs less,
several are read on one line, one after the other, none seeing another, and their keys and values are then copied to the
rows of a cache (packing, as in training: Krell et al., 2021, arXiv:2107.02027). Keys are turned by positions in their
own prompt, so a row's are the same wherever it was read.

Chunks have a few fixed lengths and caches a few sizes: few programs are compiled, whatever lengths are asked for.
Shapes: C lines, T slots of a chunk, B rows, S slots of a cache.
"""

import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.layers import kv_cache
from keras_vaultgemma.layers.attention import causal_mask
from keras_vaultgemma.layers.kv_cache import EMPTY, KVCache

CHUNKS = (256, 64, 16)
"""Lengths of prompt chunks, tokens. Below 16 a chunk costs about as much as 16: the time goes into reading weights."""

CHUNK_COST = 24
"""Tokens that could be read in the time that a chunk costs whatever its length: above all, the weights are read.

On 2 CPU cores chunks of 16, 64 and 256 tokens take 0.20, 0.49 and 1.67 s on JAX at VaultGemma's size, 0.25, 0.48 and
1.73 s on TensorFlow, 0.34, 0.60 and 1.85 s on PyTorch.
"""

UNBOUNDED = 2**30
"""The window of a layer that sees all positions."""

SMALLEST_CACHE, CACHE_GROWTH = 256, (4, 2)
"""Slots of the smallest cache; the ratio of one cache size to the next for one row, and for several, whose slots take a
larger part of a step's time."""


class Prefill:
    """Compiled reading of prompts for one model.

    Args:
        model: has `backbone`.
        compile: as `backend.compile_function`, for the model's variables.
    """

    def __init__(self, model, compile):
        self._backbone = model.backbone
        self._empty = compile(self._empty_cache)
        if backend.COMPILES_LAYERS:
            self._layers = compile(
                self._read_layer, donate=(10, 11), layers=self._backbone.transformer_layers
            )
            self._read_chunk = self._read_by_layer
        else:
            self._read_chunk = compile(self._read, donate=(5, 6), fused=False)
        self._unpack = compile(_unpack)

    def __call__(self, rows, room):
        """Read rows of ids into a new cache with room for `room` tokens more.

        Returns:
            (hidden state [B, D] of each row's last token, cache, first free slot as an int).
        """
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        slots = cache_slots(max(longest + room, sum(chunk_lengths(longest, len(rows)))), len(rows))
        lines = pack_prompts(lengths, slots)
        width = max(sum(lengths[i] for i in line) for line in lines)
        chunks = chunk_lengths(width, len(lines))
        token_ids = np.zeros((len(lines), sum(chunks)), "int32")
        positions, segments = np.full_like(token_ids, EMPTY), np.zeros((len(lines), slots), "int32")
        places = np.zeros((len(rows), 2), "int32")  # line and slot of each row's last token
        for number, line in enumerate(lines):
            start = 0
            for segment, i in enumerate(line):
                part = slice(start, start + lengths[i])
                token_ids[number, part], positions[number, part] = rows[i], np.arange(lengths[i])
                segments[number, part] = segment
                start = part.stop
                places[i] = number, start - 1
        hidden, cache = self._empty(
            *(backend.as_argument(np.zeros(n, "int8")) for n in (len(rows), (len(lines), slots)))
        )
        segments, at = _int(segments), _int(places)
        start = 0
        for length in chunks:
            part = slice(start, start + length)
            chunk = _int(token_ids[:, part]), _int(positions[:, part])
            hidden, cache = self._read_chunk(*chunk, segments, at, _int(start), hidden, cache)
            start += length
        if len(lines) < len(rows):
            slot = np.arange(slots)[None]
            length = np.array(lengths)[:, None]
            source = np.where(slot < length, places[:, 1:] + 1 - length + slot, 0)
            cache = self._unpack(
                cache, _int(places[:, 0]), _int(source), _int(np.where(slot < length, slot, EMPTY))
            )
        return hidden, cache, longest

    def _empty_cache(self, rows, lines):
        """A hidden state [B, D] and a cache for as many rows, lines and slots as `rows` [B] and `lines` [C, S] have."""
        hidden = ops.zeros((rows.shape[0], self._backbone.hidden_dim), self._backbone.compute_dtype)
        return hidden, self._backbone.empty_cache(*lines.shape)

    def _read(self, token_ids, positions, segments, places, start, hidden, cache):
        """Read one chunk of the lines, [C, T], into slots `start` to `start + T` of the cache.

        Args:
            segments: int32 [C, S], numbers of the prompts on each line.
            places: int32 [B, 2], line and slot of each row's last token.

        Returns:
            (hidden state [B, D] of each row's last token so far, cache).
        """
        states, cache = self._backbone.walk(
            token_ids, positions, cache=cache, start=start, segments=segments
        )
        return _look_up(states, places, start, hidden), cache

    def _read_by_layer(self, token_ids, positions, segments, places, start, hidden, cache):
        """As `_read`, with programs of one layer each."""
        backbone, keys, values = self._backbone, list(cache.keys), list(cache.values)
        x = np.zeros((*token_ids.shape, backbone.hidden_dim), backbone.compute_dtype)
        last = len(keys) - 1
        for i, (read, layer_type) in enumerate(
            zip(self._layers, backbone.layer_types, strict=True)
        ):
            window = (
                backbone.sliding_window_size if layer_type == "sliding_attention" else UNBOUNDED
            )
            where = np.array(i == 0), np.array(i == last), np.array(window, "int32")
            chunk = token_ids, positions, segments, places, start, cache.positions
            x, last_hidden, keys[i], values[i], key_positions = read(
                *where, *chunk, hidden, x, keys[i], values[i]
            )
        return last_hidden, KVCache(tuple(keys), tuple(values), key_positions)

    def _read_layer(
        self, block, is_first, is_last, window, token_ids, positions, segments, places, start, key_positions, hidden,
        x, key, value,
    ):  # fmt: skip
        """What one layer does of `_read`.

        Args:
            is_first, is_last: bool scalars; the first layer embeds the tokens, the last one looks rows up.
            window: int32 scalar, how many positions a query sees.
            key_positions: int32 [C, S], positions in the cache before the chunk.
            x: [C, T, D], from the layer before.
            key, value: of this layer's cache.

        Returns:
            (x, hidden, key, value, positions in the cache).
        """
        backbone = self._backbone
        x = ops.cond(is_first, lambda: backbone.embed(token_ids), lambda: x)
        key_positions = kv_cache.write(key_positions, positions, start)
        mask, angles = (
            causal_mask(positions, key_positions, window, segments, start),
            backbone.rotary_angles(positions),
        )
        x, (key, value) = block(
            x, angles=angles, attention_mask=mask, cache=(key, value), start=start
        )
        new_hidden = lambda: _look_up(x, places, start, hidden, backbone.final_norm)  # noqa: E731
        return x, ops.cond(is_last, new_hidden, lambda: hidden), key, value, key_positions


def _look_up(states, places, start, hidden, norm=lambda x: x):
    """`hidden` [B, D] with what is in `states` [C, T, D], normalised, for rows whose last token is in this chunk."""
    length = states.shape[1]
    at = places[:, 1] - start
    found = ops.reshape(states, (-1, states.shape[-1]))
    found = norm(ops.take(found, places[:, 0] * length + ops.clip(at, 0, length - 1), axis=0))
    return ops.where(ops.logical_and(at >= 0, at < length)[:, None], found, hidden)


def _unpack(cache, lines, source, positions):
    """A cache of rows from one of lines.

    Args:
        lines: int32 [B], the line of each row.
        source: int32 [B, S], the slot in that line.
        positions: int32 [B, S], of the new cache.
    """
    _, slots, head_dim = cache.keys[0].shape
    heads = cache.keys[0].shape[0] // cache.positions.shape[0]
    index = (lines[:, None] * heads + ops.arange(heads, dtype="int32"))[
        :, :, None
    ] * slots + source[:, None]
    index = ops.reshape(index, (-1, slots))

    def rows_of(tensor):
        return ops.take(ops.reshape(tensor, (-1, head_dim)), index, axis=0)

    return KVCache(tuple(map(rows_of, cache.keys)), tuple(map(rows_of, cache.values)), positions)


def chunk_lengths(length, lines=1):
    """Lengths of the chunks that read `lines` lines of `length` tokens at the least cost, largest first."""
    return _cheapest_chunks(int(length), lines, CHUNKS)


def _cheapest_chunks(length, lines, kinds):
    kind, *smaller = kinds
    padded = [kind] * -(-length // kind)
    if not smaller:
        return padded
    closer = [kind] * (length // kind) + _cheapest_chunks(length % kind, lines, smaller)
    return min(closer, padded, key=lambda chunks: _cost(chunks, lines))


def _cost(chunks, lines):
    return sum(lines * length + CHUNK_COST for length in chunks)


def prefill_cost(lines, width):
    """Tokens that could be read in the time that reading lines of `width` tokens takes."""
    return _cost(chunk_lengths(width, lines), lines)


def pack_prompts(lengths, slots):
    """Which rows to read on which line: lists of row numbers, as cheap as can be.

    A line has at most `slots` tokens, and there are as many lines as rows, or a power of two: few programs.

    Args:
        lengths: of the rows, none above `slots`.
    """
    best, count = [[i] for i in range(len(lengths))], 1
    cost = prefill_cost(len(lengths), max(lengths))
    while count < len(lengths):
        lines, filled = [[] for _ in range(count)], [0] * count
        # The longest first, each where there is most room: lines become about equally long.
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            line = filled.index(min(filled))
            lines[line].append(i)
            filled[line] += lengths[i]
        width = max(filled)
        if sum(chunk_lengths(width, count)) <= slots and prefill_cost(count, width) < cost:
            best, cost = lines, prefill_cost(count, width)
        count *= 2
    return best


def cache_slots(needed, rows):
    """The smallest cache size for so many rows that has `needed` slots."""
    slots = SMALLEST_CACHE
    while slots < needed:
        slots *= CACHE_GROWTH[rows > 1]
    return slots


def _int(x):
    return backend.as_argument(np.asarray(x, "int32"))
