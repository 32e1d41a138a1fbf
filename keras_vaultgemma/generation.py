"""Ids in, ids out: prefill, step, decode. Knows no text, no tokenizer and no preset.

A batch of prompts of different lengths fills slots 0 to P of a cache, padded on the right. From there on all rows write
the same slot at the same time, each at its own position (cache.py says why that is exact), so a batch takes as many
steps as its longest answer. Prompts are fed in chunks of a few fixed lengths and caches come in a few sizes: few
programs are compiled, whatever lengths are asked for.
"""

from typing import NamedTuple

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_vaultgemma import backend, ids
from keras_vaultgemma.attention import positions_of
from keras_vaultgemma.cache import EMPTY, KVCache, write

CHUNKS = (256, 64, 16)
"""Lengths of prompt chunks, tokens. Below 16 a chunk costs about as much as 16: the time goes into reading weights."""

SMALLEST_CACHE, CACHE_GROWTH = 64, 4
"""Slots of the smallest cache, and the ratio of one cache size to the next."""

STOP_IDS = 8
"""Stop ids are padded to a multiple of this, so that their number does not cause a compilation."""


class DecodeState(NamedTuple):
    """Everything that one step reads and the next one needs; B rows, S slots.

    Attributes:
        cache: `KVCache` of what was read so far; the last token is not in it yet.
        tokens: int32 [B, S], the tokens chosen, each in the slot that it will be read from.
        slot: int32 scalar, where the next token goes in `tokens`; the last one stands before it.
        positions: int32 [B], position of the last token in its row.
        remaining: int32 [B], tokens that a row may still choose; 0 once it has chosen a stop id.
        seeds: list of the sampler's seed states.
    """

    cache: KVCache
    tokens: object
    slot: object
    positions: object
    remaining: object
    seeds: list


class Generator:
    """Compiled generation for one model and one sampler.

    Args:
        model: has `backbone` (with `walk` and `empty_cache`), `logits(hidden_states)` and `variables`.
        sampler: a `keras_hub.samplers.Sampler`. Those that choose a token from its probabilities alone (greedy, random,
            top-k, top-p) take the fast path; beam and contrastive search drive their own loop.
        run_eagerly: do not compile, to debug.

    Raises:
        ValueError: for `SpeculativeSampler`, which needs a second model.
    """

    def __init__(self, model, sampler, run_eagerly=False):
        if isinstance(sampler, keras_hub.samplers.SpeculativeSampler):
            raise ValueError("`sampler` must be one that needs no draft model. Received: a SpeculativeSampler")
        self.model = model
        self.sampler = sampler
        self.variables = list(model.variables)
        self._compile = (lambda function, donate=(): function) if run_eagerly else self._compile_function
        self._read_chunk = self._compile(self._read, donate=(2, 3))
        self._decode_all = self._compile(self._decode, donate=(1,))
        self._searches = {}

    def _compile_function(self, function, donate=()):
        return backend.compile_function(function, self.variables, donate)

    def generate(self, rows, limits, stop_token_ids=()):
        """Continue each row of ids.

        Args:
            rows: list of non-empty lists of ids.
            limits: list of ints, how many tokens each row may get.
            stop_token_ids: ids that end a row.

        Returns:
            List of lists of ids: what was generated, the stop id included.
        """
        if max(limits) <= 0:
            return [[] for _ in rows]
        chooses_by_itself = type(self.sampler).__call__ is keras_hub.samplers.Sampler.__call__
        generate = self._generate if chooses_by_itself else self._search
        tokens = generate(rows, limits, tuple(sorted(stop_token_ids)))
        return [cut_after_stop(row[:limit], stop_token_ids) for row, limit in zip(tokens, limits, strict=True)]

    def _generate(self, rows, limits, stop_token_ids):
        lengths = np.array([len(row) for row in rows], "int32")
        chunks = chunk_lengths(lengths.max())
        prompt_slots = sum(chunks)
        slots = cache_slots(prompt_slots + max(limits))
        token_ids, mask = ids.pad(rows, prompt_slots)
        positions = np.where(mask, np.arange(prompt_slots, dtype="int32"), EMPTY).astype("int32")

        cache = self.model.backbone.empty_cache(len(rows), slots)
        hidden = ops.zeros((len(rows), self.model.backbone.hidden_dim), self.model.backbone.compute_dtype)
        start = 0
        for length in chunks:
            part = slice(start, start + length)
            hidden, cache = self._read_chunk(
                _int(token_ids[:, part]), _int(positions[:, part]), hidden, cache, _int(start)
            )
            start += length

        stops = np.full(-(-max(len(stop_token_ids), 1) // STOP_IDS) * STOP_IDS, -1, "int32")
        stops[: len(stop_token_ids)] = stop_token_ids
        state = DecodeState(
            cache=cache,
            tokens=ops.zeros((len(rows), slots), "int32"),
            slot=_int(start),
            positions=_int(lengths - 1),
            remaining=_int(limits),
            seeds=[ops.convert_to_tensor(v) for v in self.sampler.variables],
        )
        state = self._decode_all(hidden, state, _int(stops))
        self._keep(state.seeds)
        return ops.convert_to_numpy(state.tokens)[:, start:].tolist()

    def _read(self, token_ids, positions, hidden, cache, start):
        """Read one chunk of the prompts [B, T] into the cache.

        Returns:
            (hidden state [B, D] of each row's last token so far, cache).
        """
        states, cache = self.model.backbone.walk(token_ids, positions, cache=cache, start=start)
        last = ops.cast(ops.argmax(positions, axis=1), "int32")
        found = ops.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        return ops.where(ops.max(positions, axis=1)[:, None] > EMPTY, found, hidden), cache

    def _decode(self, hidden, state, stop_token_ids):
        """Choose the first token from the prompts' last hidden states [B, D], then step until every row has ended."""
        state = self._choose(hidden, state, stop_token_ids)
        (state,) = ops.while_loop(
            lambda state: ops.any(state.remaining > 0), lambda state: (self._step(state, stop_token_ids),), (state,)
        )
        return state

    def _step(self, state, stop_token_ids):
        """Read the last token of each row and choose the next."""
        last = ops.slice(state.tokens, (0, state.slot - 1), (state.tokens.shape[0], 1))
        # A row that has ended goes along; what it reads is marked as padding.
        positions = ops.where(state.remaining > 0, state.positions, EMPTY)[:, None]
        states, cache = self.model.backbone.walk(last, positions, cache=state.cache, start=state.slot - 1)
        return self._choose(states[:, 0], state._replace(cache=cache), stop_token_ids)

    def _choose(self, hidden, state, stop_token_ids):
        """Choose each row's next token from its last hidden state [B, D]: a pure function of it and the seeds."""
        logits = self.model.logits(hidden[:, None])[:, 0]
        with self._sampler_scope(state.seeds) as scope:
            token = self.sampler.get_next_token(self.sampler.compute_probabilities(logits))
            seeds = [scope.get_current_value(v) for v in self.sampler.variables]
        goes_on = state.remaining > 0
        token = ops.where(goes_on, ops.cast(token, "int32"), 0)
        stops = ops.any(token[:, None] == stop_token_ids[None], axis=1)
        return state._replace(
            tokens=write(state.tokens, token[:, None], state.slot),
            slot=state.slot + 1,
            positions=state.positions + 1,
            remaining=ops.where(ops.logical_or(stops, ops.logical_not(goes_on)), 0, state.remaining - 1),
            seeds=seeds,
        )

    def _sampler_scope(self, seeds, also=()):
        """A scope in which the sampler reads and advances `seeds` instead of its own variables."""
        return keras.StatelessScope(state_mapping=[*zip(self.sampler.variables, seeds, strict=True), *also])

    def _keep(self, seeds):
        for variable, value in zip(self.sampler.variables, seeds, strict=True):
            variable.assign(value)

    def _search(self, rows, limits, stop_token_ids):
        """Samplers with a loop of their own, under keras-hub's contract: slot and position are the same, every row is
        read again from the end of the shortest prompt."""
        total = max(len(row) + limit for row, limit in zip(rows, limits, strict=True))
        token_ids, mask = ids.pad(rows, total)
        if stop_token_ids not in self._searches:
            self._searches[stop_token_ids] = self._compile(
                lambda *args: self._run_sampler(*args, stop_token_ids or None)
            )
        seeds = [ops.convert_to_tensor(v) for v in self.sampler.variables]
        index = min(map(len, rows))
        tokens, seeds = self._searches[stop_token_ids](_int(token_ids), _int(mask), _int(index), seeds)
        self._keep(seeds)
        return [row[len(prompt) :] for row, prompt in zip(ops.convert_to_numpy(tokens).tolist(), rows, strict=True)]

    def _run_sampler(self, token_ids, padding_mask, index, seeds, stop_token_ids):
        backbone = self.model.backbone
        mask = ops.cast(padding_mask, "bool")
        cache = backbone.empty_cache(*token_ids.shape)
        hidden_states, cache = backbone.walk(token_ids, positions_of(padding_mask), cache=cache, start=0)

        def next_logits(prompt, cache, index):
            token = ops.slice(prompt, (0, index - 1), (prompt.shape[0], 1))
            states, cache = backbone.walk(token, ops.zeros_like(token) + index - 1, cache=cache, start=index - 1)
            return self.model.logits(states)[:, 0], states[:, 0], cache

        # On JAX the outer scope holds the model's variables, and an inner scope hides it.
        with self._sampler_scope(seeds, also=[(v, ops.convert_to_tensor(v)) for v in self.variables]) as scope:
            tokens = self.sampler(
                next=next_logits,
                prompt=token_ids,
                cache=cache,
                index=index,
                mask=mask,
                stop_token_ids=stop_token_ids,
                hidden_states=hidden_states,
                model=self.model,
            )
            seeds = [scope.get_current_value(v) for v in self.sampler.variables]
        return tokens, seeds


def chunk_lengths(length):
    """Lengths of the chunks, largest first, that hold a prompt of `length` tokens with the least padding."""
    chunks = []
    remaining = -(-int(length) // CHUNKS[-1]) * CHUNKS[-1]
    for chunk in CHUNKS:
        chunks += [chunk] * (remaining // chunk)
        remaining %= chunk
    return chunks


def cache_slots(needed):
    """The smallest cache size that has `needed` slots."""
    slots = SMALLEST_CACHE
    while slots < needed:
        slots *= CACHE_GROWTH
    return slots


def cut_after_stop(row, stop_token_ids):
    """A row of ids up to and with the first stop id."""
    for i, token in enumerate(row):
        if token in stop_token_ids:
            return row[: i + 1]
    return row


def _int(x):
    return ops.convert_to_tensor(np.asarray(x, "int32"))
