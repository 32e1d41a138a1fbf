"""Rows of a batch to which rows come and go, each with options of its own."""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(eq=False)
class Row:
    """A row of ids to continue, with options of its own.

    Attributes:
        prompt: non-empty list of ids.
        limit: int. Maximum number of new tokens.
        stop_token_ids: ids that end the row, at most `state.ID_BLOCK`.
        temperature: float. 0 chooses the most likely token. Defaults to 0.
        top_p: float. See `sampling.top_p`. Defaults to 1, for all tokens.
        min_p: float. See `sampling.min_p`. Defaults to 0, for all tokens.
        repetition_penalty: float. See `sampling.repetition_penalty`. Defaults to 1, for none.
        uniforms: float32 array [limit]. The uniform deviates that draw the tokens. Not read where
            the temperature is 0. Defaults to none.
        top: bool. True to report the `TOP` most likely tokens. Defaults to False.
        tokens: list of the new ids.
    """

    prompt: list
    limit: int
    stop_token_ids: tuple = ()
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    uniforms: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, "float32"))
    top: bool = False
    tokens: list = dataclasses.field(default_factory=list)

    @property
    def is_plain(self):
        """True if the next token is the most likely one."""
        return self.temperature == 0 and self.repetition_penalty == 1

    @property
    def remaining(self):
        """Number of tokens that the row may still get."""
        is_stopped = self.tokens and self.tokens[-1] in self.stop_token_ids
        return 0 if is_stopped else self.limit - len(self.tokens)

    @property
    def last_position(self):
        """Position of the last token, which is the number of tokens in the cache."""
        return len(self.prompt) + len(self.tokens) - 1


class Step(NamedTuple):
    """What one call of `ContinuousBatch.step` gave one row.

    Attributes:
        row: `Row`, whose `tokens` have the new ones.
        tokens: list of the new ids.
        log_probs: list of floats, as `state.Generated` has them. NaN where logits are not finite;
            the row has then ended.
        top: list of pairs `(ids, log_probs)` of the most likely tokens; empty unless `row.top`.
    """

    row: Row
    tokens: list
    log_probs: list
    top: list
