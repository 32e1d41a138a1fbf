"""Records of generation: the state of decoding, its controls, and its results."""

from typing import NamedTuple

import numpy as np

from keras_vaultgemma.layers.kv_cache import KVCache

NO_TOKEN = -1
"""Id that stands in `DecodeState.tokens` where a row has no token, and in padded lists of ids."""

ID_BLOCK = 8
"""Lists of ids are padded to a multiple of this length, because each length compiles a function."""


class DecodeState(NamedTuple):
    """Everything that one decoding step reads and the next one needs, for B rows and S slots.

    Attributes:
        cache: `KVCache` of all tokens but the last one.
        tokens: int32 [B, S]. Tokens of prompts and chosen tokens, each in its slot, else
            `NO_TOKEN`.
        log_probs: float32 [B, S]. Log-probabilities of the chosen tokens, in the same slots.
        slot: int32 scalar. Slot of the next token; the last one is in the slot before it.
        positions: int32 [B]. Position of the last token in its row.
        remaining: int32 [B]. Number of tokens that a row may still get; 0 after a stop id.
        seeds: list of tensors. Seed state of a sampler that draws tokens itself, else empty.
    """

    cache: KVCache
    tokens: object
    log_probs: object
    slot: object
    positions: object
    remaining: object
    seeds: list


class Settings(NamedTuple):
    """Options of one call that change which tokens its sampler chooses.

    Attributes:
        seed: int, or None to continue from the sampler's own seed.
        repetition_penalty: float. See `sampling.repetition_penalty`. 1.0 changes nothing.
        min_p: float. See `sampling.min_p`. 0.0 changes nothing.
        logit_bias: dict from ids to floats that are added to their logits.
        length_penalty: float. Exponent of the length by which beam search divides the scores of
            hypotheses. None for samplers without it, and for its default.
    """

    seed: int | None = None
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: dict = {}  # noqa: RUF012 (never changed)
    length_penalty: float | None = None

    @property
    def adjusts(self):
        """True if the settings change logits or probabilities."""
        return self.repetition_penalty != 1 or self.min_p > 0 or bool(self.logit_bias)


class Controls(NamedTuple):
    """`Settings` and stop ids as tensors.

    Attributes:
        stop_token_ids: int32 [n], padded with `NO_TOKEN`.
        uniforms: float32 [B, S]. The uniform deviate that draws the token of each slot.
        repetition_penalty: float32 scalar.
        min_p: float32 scalar.
        bias_ids: int32 [m], padded with `NO_TOKEN`.
        bias: float32 [m].
    """

    stop_token_ids: object
    uniforms: object
    repetition_penalty: object
    min_p: object
    bias_ids: object
    bias: object


class Generated(NamedTuple):
    """The tokens generated for each row.

    Attributes:
        tokens: list of lists of ids, stop ids included.
        log_probs: list of lists of floats. Log-probability of each token given those before it, in
            nats, before temperature, penalties and filters. None if the sampler runs its own loop.
        finish_reasons: list of strings, "stop" or "length".
    """

    tokens: list
    log_probs: list | None
    finish_reasons: list


def pad_list(values):
    """Return a list as an array, padded with `NO_TOKEN` to a multiple of `ID_BLOCK`."""
    values = list(values)
    length = -(-max(len(values), 1) // ID_BLOCK) * ID_BLOCK
    return np.array(values + [NO_TOKEN] * (length - len(values)))
