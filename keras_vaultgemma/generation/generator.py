"""Ids in, ids out: prefill, step, decode. Knows no text, no tokenizer and no preset.

A batch of prompts of different lengths fills slots 0 to P of a cache, padded on the right. From there on all rows write
the same slot at the same time, each at its own position (cache.py says why that is exact), so a batch takes as many
steps as its longest answer.
"""

import functools

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.data.token_ids import pad_rows
from keras_vaultgemma.generation import sampling
from keras_vaultgemma.generation.prefill import Prefill
from keras_vaultgemma.generation.state import NO_TOKEN, Controls, DecodeState, Generated, Settings
from keras_vaultgemma.layers.kv_cache import EMPTY, write

BLOCK = 8
"""Stop ids and biased ids are padded to a multiple of this, so that their number does not cause a compilation."""


class Generator:
    """Compiled generation for one model and one sampler.

    Args:
        model: has `backbone` (with `walk` and `empty_cache`), `logits(hidden_states)` and `variables`.
        sampler: a `keras_hub.samplers.Sampler` that chooses a token from its probabilities alone. For greedy, random,
            top-k and top-p the choice is made here (sampling.py), row by row; others are called as they are.
        run_eagerly: do not compile, to debug.
    """

    def __init__(self, model, sampler, run_eagerly=False):
        self.model = model
        self.sampler = sampler
        self.rule = sampling.rule_of(sampler)
        self.variables = list(model.variables)
        self.compile = _uncompiled if run_eagerly else self._compile_function
        self.prefill = Prefill(model, self.compile)
        # The second of each pair also knows penalties and biases, which cost passes over all logits.
        self._choose_first = [
            self.compile(f, donate=(1,)) for f in (self._choose_plain, self._choose_adjusted)
        ]
        steps = [self._step_plain, self._step_adjusted]
        if self.rule is not None and not run_eagerly:  # what else a sampler does is its own affair
            loops = [backend.compile_step(step, self.variables) for step in steps]
        else:
            loops = [lambda step=step: step for step in steps]
        self._go_on = [self.compile(_loop(begin), donate=(0,)) for begin in loops]

    def _compile_function(self, function, **options):
        return backend.compile_function(function, self.variables, **options)

    def generate(self, rows, limits, stop_token_ids=(), settings=Settings(), ends=None):  # noqa: B008
        """Continue each row of ids.

        Args:
            rows: list of non-empty lists of ids.
            limits: list of ints, how many tokens each row may get.
            stop_token_ids: ids that end a row.
            settings: `Settings`.
            ends: None, or a function of (row number, its tokens so far) that says whether the row has ended; it is
                asked every few tokens.

        Returns:
            `Generated`.
        """
        tokens, log_probs = [[] for _ in rows], [[] for _ in rows]
        stream = self.stream(rows, limits, stop_token_ids, settings, None if ends is None else 4)
        ended = None
        while True:
            try:
                new_tokens, new_log_probs = stream.send(ended)
            except StopIteration:
                break
            for i, (new, probs) in enumerate(zip(new_tokens, new_log_probs, strict=True)):
                tokens[i] += new
                log_probs[i] += probs
            ended = None if ends is None else [ends(i, row) for i, row in enumerate(tokens)]
        reasons = ["stop" if row and row[-1] in stop_token_ids else "length" for row in tokens]
        return Generated(tokens, log_probs, reasons)

    def stream(self, rows, limits, stop_token_ids=(), settings=Settings(), length=None):  # noqa: B008
        """Iterate over what `generate` returns, `length` tokens at a time, or all at once.

        Yields:
            (lists of new ids, lists of their log-probabilities), one list for each row. A list of bools may be sent
            back: rows that have ended.
        """
        if max(limits) <= 0:
            return
        stop_token_ids = tuple(sorted(stop_token_ids))
        hidden, cache, start = self.prefill(rows, max(limits))
        slots = cache.positions.shape[1]
        state, controls = self._first_state(rows, limits, stop_token_ids, settings, start, slots)
        state = self._choose_first[settings.adjusts](hidden, state, controls)._replace(cache=cache)
        chosen, end = start + 1, start + max(limits)
        until = end if length is None else chosen
        draws_itself = self.rule is None and settings.seed is None
        while True:
            if until > chosen:
                state = self._go_on[settings.adjusts](state, controls, _int(until))
            slot, remaining = int(state.slot), ops.convert_to_numpy(state.remaining)
            new = slice(start, slot)
            tokens = ops.convert_to_numpy(state.tokens)[:, new]
            log_probs = ops.convert_to_numpy(state.log_probs)[:, new]
            kept = tokens != NO_TOKEN
            if draws_itself:
                self._keep(state.seeds)
            ended = yield tuple(
                [row[keep].tolist() for row, keep in zip(values, kept, strict=True)]
                for values in (tokens, log_probs)
            )
            if ended is not None:
                remaining = np.where(ended, 0, remaining)
                state = state._replace(remaining=_int(remaining))
            if not (remaining > 0).any():
                return
            if draws_itself:  # other calls may have drawn meanwhile
                state = state._replace(seeds=self._own_seeds())
            start = chosen = slot
            until = min(slot + (length or end), end)

    def _first_state(self, rows, limits, stop_token_ids, settings, start, slots):
        """(state before the first choice, controls). The state's cache is left out: the first choice reads none."""
        tokens, mask = pad_rows(rows, slots)
        tokens = np.where(mask, tokens, NO_TOKEN)
        uniforms, seeds = np.zeros((len(rows), slots), "float32"), []
        if self.rule is None:
            seeds = self._own_seeds()
            if settings.seed is not None:
                seeds = [
                    backend.as_argument(np.array([settings.seed, 0], v.dtype))
                    for v in self.sampler.variables
                ]
        elif self.rule.kind != "greedy":
            entropy = self._next_entropy() if settings.seed is None else [settings.seed]
            uniforms[:, start : start + max(limits)] = sampling.uniforms(entropy, rows, max(limits))
        bias_ids, bias = (
            _padded(list(settings.logit_bias), "int32"),
            _padded(settings.logit_bias.values(), "float32"),
        )
        state = DecodeState(
            cache=(),
            tokens=_int(tokens),
            log_probs=backend.as_argument(np.zeros((len(rows), slots), "float32")),
            slot=_int(start),
            positions=_int([len(row) - 1 for row in rows]),
            remaining=_int(limits),
            seeds=seeds,
        )
        floats = (uniforms, settings.repetition_penalty, settings.min_p)
        floats = [np.asarray(x, "float32") for x in floats]
        return state, Controls(
            *map(backend.as_argument, (_padded(stop_token_ids, "int32"), *floats, bias_ids, bias))
        )

    def _step_plain(self, state, controls):
        return self._step(state, controls, adjusts=False)

    def _step_adjusted(self, state, controls):
        return self._step(state, controls, adjusts=True)

    def _step(self, state, controls, adjusts):
        """Read the last token of each row and choose the next."""
        last = ops.take(state.tokens, state.slot - 1, axis=1)[:, None]
        # A row that has ended goes along; what it reads is marked as padding.
        positions = ops.where(state.remaining > 0, state.positions, EMPTY)[:, None]
        states, cache = self.model.backbone.walk(
            ops.maximum(last, 0), positions, cache=state.cache, start=state.slot - 1
        )
        return self._choose(states[:, 0], state._replace(cache=cache), controls, adjusts)

    def _choose_plain(self, hidden, state, controls):
        return self._choose(hidden, state, controls, adjusts=False)

    def _choose_adjusted(self, hidden, state, controls):
        return self._choose(hidden, state, controls, adjusts=True)

    def _choose(self, hidden, state, controls, adjusts):
        """Choose each row's next token from its last hidden state [B, D]: a pure function of it, controls and seeds."""
        logits = self.model.logits(hidden[:, None])[:, 0]
        token, seeds = self._token(logits, state, controls, adjusts)
        chosen = ops.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        log_prob = chosen - ops.logsumexp(logits, axis=1)
        goes_on = state.remaining > 0
        stops = ops.any(token[:, None] == controls.stop_token_ids[None], axis=1)
        return state._replace(
            tokens=write(state.tokens, ops.where(goes_on, token, NO_TOKEN)[:, None], state.slot),
            log_probs=write(state.log_probs, log_prob[:, None], state.slot),
            slot=state.slot + 1,
            positions=state.positions + 1,
            remaining=ops.where(
                ops.logical_or(stops, ops.logical_not(goes_on)), 0, state.remaining - 1
            ),
            seeds=seeds,
        )

    def _token(self, logits, state, controls, adjusts):
        """(int32 [B], seeds) for logits [B, V]."""
        if adjusts:
            logits = sampling.repetition_penalty(logits, state.tokens, controls.repetition_penalty)
            logits = sampling.logit_bias(logits, controls.bias_ids, controls.bias)
        if self.rule is not None and self.rule.kind == "greedy":
            return ops.cast(ops.argmax(logits, axis=-1), "int32"), state.seeds
        if self.rule is not None:
            probabilities = sampling.probabilities(logits, self.rule)
        else:
            probabilities = self.sampler.compute_probabilities(logits)
        if adjusts:
            probabilities = sampling.min_p(probabilities, controls.min_p)
        if self.rule is not None:
            return sampling.draw(
                probabilities, ops.take(controls.uniforms, state.slot, axis=1)
            ), state.seeds
        scope_seeds = zip(self.sampler.variables, state.seeds, strict=True)
        with keras.StatelessScope(state_mapping=scope_seeds) as scope:
            token = self.sampler.get_next_token(probabilities)
            seeds = [scope.get_current_value(v) for v in self.sampler.variables]
        return ops.cast(token, "int32"), seeds

    def _next_entropy(self):
        """What the random numbers of a call depend on. The sampler goes on at once: no later call gets the same."""
        numbers = [np.array(ops.convert_to_numpy(v)) for v in self.sampler.variables]
        for variable, number in zip(self.sampler.variables, numbers, strict=True):
            # As if the sampler had drawn: its second number counts.
            variable.assign(number + np.array([0, 1], number.dtype))
        return np.ravel(numbers).tolist()

    def _own_seeds(self):
        # Copies: the state is donated, and the sampler's variables are not.
        return [
            backend.as_argument(np.array(ops.convert_to_numpy(v))) for v in self.sampler.variables
        ]

    def _keep(self, seeds):
        for variable, value in zip(self.sampler.variables, seeds, strict=True):
            variable.assign(value)


def _uncompiled(function, layers=None, **options):
    return function if layers is None else [functools.partial(function, layer) for layer in layers]


def _loop(begin):
    """A function that makes steps, of what `begin` returns, until every row has ended or slot `until` is reached."""

    def decode(state, controls, until):
        step = begin()

        def goes_on(state):
            return ops.logical_and(ops.any(state.remaining > 0), state.slot < until)

        (state,) = ops.while_loop(goes_on, lambda state: (step(state, controls),), (state,))
        return state

    return decode


def _int(x):
    return backend.as_argument(np.asarray(x, "int32"))


def _padded(values, dtype):
    """A list as an array whose length is a multiple of `BLOCK`, padded with `NOTHING`."""
    values = list(values)
    array = np.full(-(-max(len(values), 1) // BLOCK) * BLOCK, NO_TOKEN, dtype)
    array[: len(values)] = values
    return array
