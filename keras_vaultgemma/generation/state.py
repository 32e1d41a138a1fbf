"""What one step of decoding reads and hands on, and what generation gives in the end."""

from typing import NamedTuple

from keras_vaultgemma.layers.kv_cache import KVCache

NO_TOKEN = -1
"""Stands in `DecodeState.tokens` where a row has no token."""


class DecodeState(NamedTuple):
    """Everything that one step reads and the next one needs; B rows, S slots.

    Attributes:
        cache: `KVCache` of what was read so far; the last token is not in it yet.
        tokens: int32 [B, S], prompts and chosen tokens, each in the slot that it is read from, else `NOTHING`.
        log_probs: float32 [B, S], of the chosen tokens, in the same slots.
        slot: int32 scalar, where the next token goes in `tokens`; the last one stands before it.
        positions: int32 [B], position of the last token in its row.
        remaining: int32 [B], tokens that a row may still choose; 0 once it has chosen a stop id.
        seeds: list of the seed states of a sampler that is called as it is; empty where the choice is made here.
    """

    cache: KVCache
    tokens: object
    log_probs: object
    slot: object
    positions: object
    remaining: object
    seeds: list


class Settings(NamedTuple):
    """How one call of `generate` changes the choice of tokens, beside its sampler.

    Attributes:
        seed: int for draws that do not depend on earlier calls, or None to go on from the sampler's seed.
        repetition_penalty, min_p: as in sampling.py; 1.0 and 0.0 change nothing.
        logit_bias: `{id: number added to its logit}`.
    """

    seed: int | None = None
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: dict = {}  # noqa: RUF012 (never changed)

    @property
    def adjusts(self):
        """Whether probabilities are changed at all."""
        return self.repetition_penalty != 1 or self.min_p > 0 or bool(self.logit_bias)


class Controls(NamedTuple):
    """`Settings` and limits as tensors.

    Attributes:
        stop_token_ids, bias_ids: int32 [n], `NOTHING` where unused; bias: float32 [n].
        uniforms: float32 [B, S], the random number for the token in each slot.
        repetition_penalty, min_p: float32 scalars.
    """

    stop_token_ids: object
    uniforms: object
    repetition_penalty: object
    min_p: object
    bias_ids: object
    bias: object


class Generated(NamedTuple):
    """What was generated for each row.

    Attributes:
        tokens: lists of ids, the stop id included.
        log_probs: lists of log p(token | what stands before it) under the model, in nats, before temperature, penalties
            and filters. None where the sampler drives its own loop.
        finish_reasons: "stop" or "length".
    """

    tokens: list
    log_probs: list | None
    finish_reasons: list
