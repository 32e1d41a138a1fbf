"""Generation of token ids: prefill, then decoding steps in a compiled loop.

Prompts of a batch fill slots 0 to P of a cache, padded on the right. From there on all rows write
the same slot at the same time, each at its own position, so a batch takes as many steps as its
longest answer (`layers/kv_cache.py` explains why that is exact).
"""

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.data.token_ids import pad_rows
from keras_vaultgemma.generation import sampling
from keras_vaultgemma.generation.prefill import Prefill
from keras_vaultgemma.generation.state import (
    NO_TOKEN,
    Controls,
    DecodeState,
    Generated,
    Settings,
    pad_list,
)
from keras_vaultgemma.generation.validation import check_finite
from keras_vaultgemma.layers.kv_cache import EMPTY, write

STOP_CHECK_INTERVAL = 4
"""Number of tokens between two calls of a function that ends rows."""


class Generator:
    """Compiled generation with one model and one sampler.

    Args:
        model: has `backbone` (with `walk` and `empty_cache`), `logits(hidden_states)`, `variables`.
        sampler: `keras_hub.samplers.Sampler` that chooses a token from its probabilities alone.
            Greedy, random, top-k and top-p are computed row by row in `sampling.py`; others are
            called as they are.
        run_eagerly: bool. True to run without compilation, for debugging. Defaults to False.
    """

    def __init__(self, model, sampler, run_eagerly=False):
        self.model = model
        self.sampler = sampler
        self.rule = sampling.rule_of(sampler)
        self.variables = list(model.variables)
        self.compile = _uncompiled if run_eagerly else self._compile_function
        self.prefill = Prefill(model, self.compile)
        # One of each for settings that adjust probabilities, because that costs several passes over
        # all logits.
        self._choose_first = {
            False: self.compile(self._choose_plain, donate=(1,)),
            True: self.compile(self._choose_adjusted, donate=(1,)),
        }
        self._decode = {
            False: self.compile(self._loop(self._step_plain, run_eagerly), donate=(0,)),
            True: self.compile(self._loop(self._step_adjusted, run_eagerly), donate=(0,)),
        }

    def _compile_function(self, function, **options):
        return backend.compile_function(function, self.variables, **options)

    def _loop(self, step, run_eagerly):
        """Return a function that repeats `step` until all rows have ended or slot `until`."""
        if run_eagerly or self.rule is None:  # another sampler may do more than tensor operations
            begin = lambda: step  # noqa: E731
        else:
            begin = backend.record_step(step, self.variables)

        def decode(state, controls, until):
            step = begin()

            def continues(state):
                return ops.logical_and(ops.any(state.remaining > 0), state.slot < until)

            (state,) = ops.while_loop(continues, lambda state: (step(state, controls),), (state,))
            return state

        return decode

    def generate(self, rows, limits, stop_token_ids=(), settings=Settings(), ends=None):  # noqa: B008
        """Continue each row of ids.

        Args:
            rows: list of non-empty lists of ids.
            limits: list of ints. Maximum number of new tokens of each row.
            stop_token_ids: ids that end a row. Defaults to none.
            settings: `Settings`.
            ends: None, or a function of a row's index and its new tokens that returns True if the
                row has ended. It is called every few tokens.

        Returns:
            `Generated`.
        """
        tokens, log_probs = [[] for _ in rows], [[] for _ in rows]
        interval = None if ends is None else STOP_CHECK_INTERVAL
        stream = self.stream(rows, limits, stop_token_ids, settings, interval)
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

    def stream(self, rows, limits, stop_token_ids=(), settings=Settings(), interval=None):  # noqa: B008
        """Iterate over the new tokens of `generate`.

        Args:
            rows, limits, stop_token_ids, settings: as for `generate`.
            interval: int. Number of decoding steps between two yields. Defaults to all steps.

        Yields:
            Tuple `(tokens, log_probs)`, with a list of new ids and a list of floats for each row. A
            list of bools may be sent back: True for rows that have ended.
        """
        if max(limits) <= 0:
            return
        stop_token_ids = tuple(sorted(stop_token_ids))
        hidden, cache, start = self.prefill(rows, max(limits))
        slots = cache.positions.shape[1]
        state, controls = self._first_state(rows, limits, stop_token_ids, settings, start, slots)
        state = self._choose_first[settings.adjusts](hidden, state, controls)._replace(cache=cache)
        chosen, end = start + 1, start + max(limits)
        until = end if interval is None else chosen
        continues_seeds = self.rule is None and settings.seed is None
        while True:
            if until > chosen:
                state = self._decode[settings.adjusts](state, controls, _int(until))
            slot, remaining = int(state.slot), ops.convert_to_numpy(state.remaining)
            new = slice(start, slot)
            tokens = ops.convert_to_numpy(state.tokens)[:, new]
            log_probs = ops.convert_to_numpy(state.log_probs)[:, new]
            is_token = tokens != NO_TOKEN
            check_finite(log_probs[is_token])
            if continues_seeds:
                self._assign_seeds(state.seeds)
            ended = yield tuple(
                [row[selected].tolist() for row, selected in zip(values, is_token, strict=True)]
                for values in (tokens, log_probs)
            )
            if ended is not None:
                remaining = np.where(ended, 0, remaining)
                state = state._replace(remaining=_int(remaining))
            if not (remaining > 0).any():
                return
            if continues_seeds:  # other calls may have drawn in the meantime
                state = state._replace(seeds=self._sampler_seeds())
            start = chosen = slot
            until = min(slot + (interval or end), end)

    def _first_state(self, rows, limits, stop_token_ids, settings, start, slots):
        """Return the `DecodeState` before the first choice, without a cache, and the `Controls`."""
        tokens, mask = pad_rows(rows, slots)
        tokens = np.where(mask, tokens, NO_TOKEN)
        uniforms, seeds = np.zeros((len(rows), slots), "float32"), []
        if self.rule is None:
            seeds = self._sampler_seeds()
            if settings.seed is not None:
                seeds = [
                    backend.as_argument(np.array([settings.seed, 0], v.dtype))
                    for v in self.sampler.variables
                ]
        elif self.rule.kind != "greedy":
            entropy = self._next_entropy() if settings.seed is None else [settings.seed]
            uniforms[:, start : start + max(limits)] = sampling.uniforms(entropy, rows, max(limits))
        state = DecodeState(
            cache=(),
            tokens=_int(tokens),
            log_probs=_float(np.zeros((len(rows), slots))),
            slot=_int(start),
            positions=_int([len(row) - 1 for row in rows]),
            remaining=_int(limits),
            seeds=seeds,
        )
        return state, Controls(
            stop_token_ids=_int(pad_list(stop_token_ids)),
            uniforms=_float(uniforms),
            repetition_penalty=_float(settings.repetition_penalty),
            min_p=_float(settings.min_p),
            bias_ids=_int(pad_list(settings.logit_bias)),
            bias=_float(pad_list(settings.logit_bias.values())),
        )

    def _step_plain(self, state, controls):
        return self._step(state, controls, adjusts=False)

    def _step_adjusted(self, state, controls):
        return self._step(state, controls, adjusts=True)

    def _step(self, state, controls, adjusts):
        """Read the last token of each row and choose the next one."""
        last = ops.take(state.tokens, state.slot - 1, axis=1)[:, None]
        # Rows that have ended are computed with the rest, as padding.
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
        """Return the state after the next token of each row, chosen from hidden states [B, D]."""
        logits = self.model.logits(hidden[:, None])[:, 0]
        token, seeds = self._choose_token(logits, state, controls, adjusts)
        chosen = ops.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        log_prob = chosen - ops.logsumexp(logits, axis=1)
        continues = state.remaining > 0
        stops = ops.any(token[:, None] == controls.stop_token_ids[None], axis=1)
        # A row whose logits are not finite ends, so that the host can say so.
        stops = ops.logical_or(stops, ops.isnan(log_prob))
        ended = ops.logical_or(stops, ops.logical_not(continues))
        return state._replace(
            tokens=write(state.tokens, ops.where(continues, token, NO_TOKEN)[:, None], state.slot),
            log_probs=write(state.log_probs, log_prob[:, None], state.slot),
            slot=state.slot + 1,
            positions=state.positions + 1,
            remaining=ops.where(ended, 0, state.remaining - 1),
            seeds=seeds,
        )

    def _choose_token(self, logits, state, controls, adjusts):
        """Return tokens, int32 [B], for logits [B, V], and the seeds after the draw."""
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
            uniform = ops.take(controls.uniforms, state.slot, axis=1)
            return sampling.draw(probabilities, uniform), state.seeds
        seed_values = zip(self.sampler.variables, state.seeds, strict=True)
        with keras.StatelessScope(state_mapping=seed_values) as scope:
            token = self.sampler.get_next_token(probabilities)
            seeds = [scope.get_current_value(v) for v in self.sampler.variables]
        return ops.cast(token, "int32"), seeds

    def _next_entropy(self):
        """Return the entropy of one call's random numbers, and advance the sampler to the next."""
        numbers = [np.array(ops.convert_to_numpy(v)) for v in self.sampler.variables]
        for variable, number in zip(self.sampler.variables, numbers, strict=True):
            # The second number of a Keras seed counts draws.
            variable.assign(number + np.array([0, 1], number.dtype))
        return np.ravel(numbers).tolist()

    def _sampler_seeds(self):
        # Copies, because the state is donated and the sampler's variables must stay valid.
        return [
            backend.as_argument(np.array(ops.convert_to_numpy(v))) for v in self.sampler.variables
        ]

    def _assign_seeds(self, seeds):
        for variable, value in zip(self.sampler.variables, seeds, strict=True):
            variable.assign(value)


def _uncompiled(function, **options):
    return function


def _int(x):
    return backend.as_argument(np.asarray(x, "int32"))


def _float(x):
    return backend.as_argument(np.asarray(x, "float32"))
