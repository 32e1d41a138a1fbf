"""Continuous batching: rows join and leave a batch between two decoding steps.

As in `generator.py`, all rows write the same slot at the same time, each at its own position. Here
that slot goes round: the cache is a ring. The prompt of a row that joins is copied into the slots
just before the next one, wherever that is, and its other slots become empty. No row has more tokens
than there are slots, so none overwrites its own.

The cache is the only state on the device. It has a few sizes, so that few functions are compiled.

Shapes: B rows of the batch, N rows that join, S slots, V vocabulary.
"""

import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.generation.batch_loop import MAX_STEPS, TOP, BatchLoop, LoopState, Options
from keras_vaultgemma.generation.batch_rows import Row, Step
from keras_vaultgemma.generation.prefill import Prefill
from keras_vaultgemma.generation.state import NO_TOKEN, pad_list
from keras_vaultgemma.layers import kv_cache
from keras_vaultgemma.layers.kv_cache import EMPTY

MIN_SLOTS = 128
"""Slots of the smallest cache. Others have this times a power of two.

Of a small model, attention to empty slots takes a quarter of a step: with 8 rows of the bundled
model and 128 slots instead of 256, a step takes 1.6 ms of processor time instead of 2.0 (JAX).
"""

SHRINK_AFTER = 32
"""Calls in a row in which a smaller cache would do, before the cache becomes smaller."""


class ContinuousBatch:
    """A batch of rows that are decoded together and come and go.

    Args:
        model: as for `generator.Generator`.
        max_rows: int. Largest number of rows. Defaults to 8.
    """

    def __init__(self, model, max_rows=8):
        self.model = model
        self.max_rows = max_rows
        variables = list(model.variables)

        def compile(function, **options):
            return backend.compile_function(function, variables, **options)

        self._loop = BatchLoop(model, variables, compile)
        self._prefill = Prefill(model, compile)
        self._gather = compile(kv_cache.gather_slots)
        self._insert = compile(_insert, donate=(0,))
        self.clear()

    def clear(self):
        """Remove all rows and free the cache."""
        self._rows, self._cache = [], None
        self._slots = self._slot = self._calls_too_large = 0

    @property
    def rows(self):
        """List of the rows in the batch."""
        return [row for row in self._rows if row is not None]

    @property
    def free(self):
        """Number of rows that can still join."""
        return self.max_rows - len(self.rows)

    def add(self, rows):
        """Let rows join. Each gets its first token with the next step.

        Args:
            rows: list of `Row`, at most `free`.
        """
        while rows:
            # Powers of two, so that few functions are compiled.
            count = 1 << len(rows).bit_length() - 1
            self._add(rows[:count])
            rows = rows[count:]

    def remove(self, row):
        """Remove a row. One that has ended is removed by `step` already."""
        if row in self._rows:
            self._rows[self._rows.index(row)] = None

    def step(self, steps=1):
        """Decode up to `steps` tokens of every row, at most `MAX_STEPS`.

        Returns:
            List of `Step`, one for each row. Rows that have ended are removed from the batch.
        """
        if not self.rows:
            return []
        self._shrink()
        members = [(i, row) for i, row in enumerate(self._rows) if row is not None]
        adjusts = not all(row.is_plain for _, row in members)
        reports = any(row.top for _, row in members)
        state, options = self._loop_arguments(reports)
        steps = min(steps, MAX_STEPS, max(row.remaining for _, row in members))
        state = self._loop(self._cache, state, options, _int(steps), adjusts)
        self._cache, self._slot = state.cache, int(state.slot)
        tokens, log_probs, *top = (
            ops.convert_to_numpy(x) for x in (state.tokens, state.log_probs, *state.top)
        )
        found = []
        for i, row in members:
            count = int((tokens[i] != NO_TOKEN).sum())
            new, probs = tokens[i, :count].tolist(), log_probs[i, :count].tolist()
            row.tokens += new
            likely = [(top[0][i, j], top[1][i, j]) for j in range(count)] if row.top else []
            found.append(Step(row, new, probs, likely))
            if not row.remaining or np.isnan(probs).any():
                self._rows[i] = None
        return found

    def _add(self, rows):
        self._resize(len(self.rows) + len(rows), self._needed_slots([*self.rows, *rows]))
        # The last token of a prompt is read by the next decoding step.
        _, prompts, _ = self._prefill([row.prompt[:-1] or row.prompt for row in rows], 0)
        lengths = [len(row.prompt) - 1 for row in rows]
        positions = ring_positions(lengths, self._slot, self._slots)
        source = np.minimum(np.maximum(positions, 0), prompts.positions.shape[1] - 1)
        free = [i for i, row in enumerate(self._rows) if row is None][: len(rows)]
        self._cache = self._insert(self._cache, prompts, _int(source), _int(positions), _int(free))
        for i, row in zip(free, rows, strict=True):
            self._rows[i] = row

    def _needed_slots(self, rows):
        return max((len(row.prompt) + row.limit for row in rows), default=0)

    def _sizes(self, rows, needed):
        """Return numbers of rows and slots that suffice."""
        return min(_power_of_two(rows), self.max_rows), max(_power_of_two(needed), MIN_SLOTS)

    def _shrink(self):
        rows, slots = self._sizes(len(self.rows), self._needed_slots(self.rows))
        is_too_large = rows < len(self._rows) or slots < self._slots
        self._calls_too_large = self._calls_too_large + 1 if is_too_large else 0
        if self._calls_too_large > SHRINK_AFTER:
            self._set_size(rows, slots)

    def _resize(self, rows, needed):
        """Make the cache large enough; if it holds no row, also no larger than that."""
        rows, slots = self._sizes(rows, needed)
        if self.rows:
            rows, slots = max(rows, len(self._rows)), max(slots, self._slots)
        self._set_size(rows, slots)

    def _set_size(self, count, slots):
        if (count, slots) == (len(self._rows), self._slots):
            return
        members = [(i, row) for i, row in enumerate(self._rows) if row is not None]
        slot = self._slot % slots
        if not members:
            self._cache = self.model.backbone.empty_cache(count, slots)
        else:
            index, lengths = np.zeros(count, "int32"), np.zeros(count, "int32")
            index[: len(members)] = [i for i, _ in members]
            lengths[: len(members)] = [row.last_position for _, row in members]
            positions = ring_positions(lengths, slot, slots)
            age = lengths[:, None] - positions
            source = np.where(positions == EMPTY, 0, (self._slot - age) % self._slots)
            self._cache = self._gather(self._cache, _int(index), _int(source), _int(positions))
        self._rows = [row for _, row in members] + [None] * (count - len(members))
        self._slots, self._slot, self._calls_too_large = slots, slot, 0

    def _loop_arguments(self, reports):
        """Return the `LoopState`, without cache, and the `Options` of the rows as they are."""
        count, rows = len(self._rows), self._rows
        nobody = Row([0], 0)
        numbers = lambda name: [getattr(row or nobody, name) for row in rows]  # noqa: E731
        column = lambda name: _float(np.array(numbers(name))[:, None])  # noqa: E731
        uniforms = np.zeros((count, MAX_STEPS), "float32")
        seen = np.full((count, self._slots), NO_TOKEN)
        positions = ring_positions(numbers("last_position"), self._slot, self._slots)
        for i, row in enumerate(rows):
            if row is not None:
                draws = row.uniforms[len(row.tokens) : len(row.tokens) + MAX_STEPS]
                uniforms[i, : len(draws)] = draws
                if row.repetition_penalty != 1:
                    ids, is_token = np.array(row.prompt + row.tokens), positions[i] != EMPTY
                    seen[i, is_token] = ids[positions[i, is_token]]
        shape = (count, MAX_STEPS)
        state = LoopState(
            cache=(),
            seen=_int(seen),
            last=_int([(row.prompt + row.tokens)[-1] if row else 0 for row in rows]),
            slot=_int(self._slot),
            step=_int(0),
            positions=_int(numbers("last_position")),
            remaining=_int(numbers("remaining")),
            tokens=_int(np.full(shape, NO_TOKEN)),
            log_probs=_float(np.zeros(shape)),
            top=(_int(np.zeros((*shape, TOP))), _float(np.zeros((*shape, TOP)))) if reports else (),
        )
        stops = np.stack([pad_list(row.stop_token_ids if row else ()) for row in rows])
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        return state, Options(_int(stops), *map(column, names), _float(uniforms))


def ring_positions(lengths, slot, slots):
    """Return the positions of the tokens in a ring whose next slot is `slot`.

    Args:
        lengths: list of N ints. Number of tokens of each row, which are in the slots before `slot`.
        slot: int from 0 to `slots - 1`.
        slots: int S.

    Returns:
        int array [N, S], `EMPTY` in slots without a token.
    """
    age = (slot - 1 - np.arange(slots)) % slots + 1
    return np.maximum(np.array(lengths)[:, None] - age, EMPTY)


def _power_of_two(n):
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _insert(cache, prompts, source, positions, rows):
    """Return the cache with the prompts of `prompts` in some of its rows.

    Args:
        cache: `KVCache` of B rows and S slots. The caller must not use it again.
        prompts: `KVCache` of N rows.
        source, positions: int32 [N, S], as for `kv_cache.gather_slots`.
        rows: int32 [N]. The rows of `cache` to replace.
    """
    new = kv_cache.gather_slots(
        prompts, ops.arange(positions.shape[0], dtype="int32"), source, positions
    )
    return kv_cache.write_rows(cache, new, rows)


def _int(x):
    return backend.as_argument(np.asarray(x, "int32"))


def _float(x):
    return backend.as_argument(np.asarray(x, "float32"))
