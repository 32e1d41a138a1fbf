"""Compiled decoding steps of a batch whose rows have options of their own.

Shapes: B rows, S slots, V vocabulary.
"""

from typing import NamedTuple

from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.generation import sampling
from keras_vaultgemma.generation.state import NO_TOKEN
from keras_vaultgemma.layers.kv_cache import EMPTY, KVCache, write

MAX_STEPS = 16
"""Largest number of decoding steps in one call."""

TOP = 20
"""Number of most likely tokens that are reported with a token, where a row asks for them."""


class Options(NamedTuple):
    """Options of the B rows as tensors. See `Row`."""

    stop_token_ids: object  # int32 [B, n]
    temperature: object  # float32 [B, 1]
    top_p: object  # float32 [B, 1]
    min_p: object  # float32 [B, 1]
    repetition_penalty: object  # float32 [B, 1]
    uniforms: object  # float32 [B, MAX_STEPS]


class LoopState(NamedTuple):
    """What a decoding step reads and the next one needs.

    Attributes:
        cache: `KVCache` of all tokens but the last one.
        seen: int32 [B, S]. Tokens in their slots, else `NO_TOKEN`.
        last: int32 [B]. Last token of each row.
        slot: int32 scalar. Slot of the last tokens, which this step writes.
        step: int32 scalar. Number of steps taken.
        positions: int32 [B]. Position of the last token.
        remaining: int32 [B]. Number of tokens that a row may still get.
        tokens, log_probs: int32 and float32 [B, MAX_STEPS]. The new tokens.
        top: tuple of int32 and float32 [B, MAX_STEPS, TOP]; empty if no row asks for them.
    """

    cache: KVCache
    seen: object
    last: object
    slot: object
    step: object
    positions: object
    remaining: object
    tokens: object
    log_probs: object
    top: tuple


class BatchLoop:
    """Compiled decoding steps of one model.

    Args:
        model: as for `generator.Generator`.
        variables: list of the model's variables.
        compile: function like `backend.compile_function` for these variables.
    """

    def __init__(self, model, variables, compile):
        self._model, self._variables, self._compile = model, variables, compile
        self._compiled = {}  # by whether rows adjust probabilities

    def __call__(self, cache, state, options, steps, adjusts):
        """Decode until all rows have ended, at most `steps` tokens.

        Args:
            cache: `KVCache`. The caller must not use it again.
            state: `LoopState` with anything as its cache.
            options: `Options`.
            steps: int32 scalar.
            adjusts: bool. False if all rows take the most likely token, which saves several passes
                over all logits.

        Returns:
            `LoopState`.
        """
        if adjusts not in self._compiled:
            self._compiled[adjusts] = self._compile(self._loop(adjusts), donate=(0,))
        return self._compiled[adjusts](cache, state, options, steps)

    def _loop(self, adjusts):
        def step(state, options):
            return self._step(state, options, adjusts)

        begin = backend.record_step(step, self._variables)

        def decode(cache, state, options, steps):
            step = begin()

            def continues(state):
                return ops.logical_and(ops.any(state.remaining > 0), state.step < steps)

            (state,) = ops.while_loop(
                continues, lambda state: (step(state, options),), (state._replace(cache=cache),)
            )
            return state

        return decode

    def _step(self, state, options, adjusts):
        """Read the last token of each row and choose the next one."""
        continues = state.remaining > 0
        positions = ops.where(continues, state.positions, EMPTY)[:, None]
        hidden, cache = self._model.backbone.walk(
            state.last[:, None], positions, cache=state.cache, start=state.slot
        )
        logits = self._model.logits(hidden)[:, 0]
        seen = write(state.seen, ops.where(continues, state.last, NO_TOKEN)[:, None], state.slot)
        token = ops.cast(ops.argmax(logits, axis=-1), "int32")
        if adjusts:
            token = _choose(logits, seen, state.step, options)
        normalizer = ops.logsumexp(logits, axis=1)
        log_prob = ops.take_along_axis(logits, token[:, None], axis=1)[:, 0] - normalizer
        stops = ops.any(token[:, None] == options.stop_token_ids, axis=1)
        # A row whose logits are not finite ends, so that the host can say so.
        ended = ops.logical_or(ops.logical_or(stops, ops.isnan(log_prob)), ~continues)
        top = state.top
        if top:
            values, ids = backend.top_k(logits, TOP)
            found = ids, values - normalizer[:, None]
            top = tuple(write(x, y[:, None], state.step) for x, y in zip(top, found, strict=True))
        slot = state.slot + 1
        return LoopState(
            cache=cache,
            seen=seen,
            last=token,
            slot=ops.where(slot == state.seen.shape[1], slot * 0, slot),
            step=state.step + 1,
            positions=state.positions + 1,
            remaining=ops.where(ended, 0, state.remaining - 1),
            tokens=write(state.tokens, ops.where(continues, token, NO_TOKEN)[:, None], state.step),
            log_probs=write(state.log_probs, log_prob[:, None], state.step),
            top=top,
        )


def _choose(logits, seen, step, options):
    """Return tokens, int32 [B]: the most likely ones where the temperature is 0, else drawn."""
    logits = sampling.repetition_penalty(logits, seen, options.repetition_penalty)
    is_greedy = options.temperature == 0
    rule = sampling.Rule("random", ops.where(is_greedy, 1.0, options.temperature), p=options.top_p)
    probabilities = sampling.min_p(sampling.probabilities(logits, rule), options.min_p)
    drawn = sampling.draw(probabilities, ops.take(options.uniforms, step, axis=1))
    best = ops.cast(ops.argmax(logits, axis=-1), "int32")
    return ops.where(is_greedy[:, 0], best, drawn)
