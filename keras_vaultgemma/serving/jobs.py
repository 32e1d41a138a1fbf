"""Jobs: one answer each, from the row that is decoded to the pieces that a client is sent."""

import dataclasses
import time
from typing import NamedTuple

import numpy as np

from keras_vaultgemma.generation.stream import TextStream, detokenizer


class Piece(NamedTuple):
    """What a client is sent of one answer at a time.

    Attributes:
        text: string. The new text.
        ids: list of the new ids, without the one that ended the answer.
        log_probs: list of floats, one for each id.
        top: list of pairs `(ids, log_probs)`, the most likely tokens instead of each id. Empty if
            nobody asked for them.
        finish_reason: "stop" or "length" with the last piece, else None.
        token_count: int. Number of tokens that the answer has so far.
        prompt_scores: `PromptScores` of the prompt, with the first piece, if they were asked for.
    """

    text: str
    ids: list
    log_probs: list
    top: list
    finish_reason: str | None = None
    token_count: int = 0
    prompt_scores: object = None


@dataclasses.dataclass(eq=False)
class Job:
    """One answer.

    Attributes:
        row: `batch_rows.Row`.
        model: string. Name of the model.
        text: `TextStream`.
        is_streamed: bool. True if pieces are delivered as they come, False for a single one.
        scores_prompt: bool. True if the prompt's tokens are scored, too.
        deliver: function of a `Piece` or of the exception that ended the job. It is called by the
            thread that decodes.
        is_cancelled: bool. Set to True by whoever needs the answer no longer.
        since: float. Time at which the job was created, of `time.monotonic`.
        prompt_scores: `PromptScores`, or None.
    """

    row: object
    model: str
    text: TextStream
    is_streamed: bool
    scores_prompt: bool
    deliver: object
    is_cancelled: bool = False
    since: float = dataclasses.field(default_factory=time.monotonic)
    prompt_scores: object = None

    def __post_init__(self):
        self._log_probs, self._top, self._sent, self._pending = [], [], 0, []

    def take(self, tokens, log_probs, top):
        """Take the new tokens of the row, and deliver what follows from them.

        Returns:
            bool. True if the answer is complete.
        """
        row = self.row
        if np.isnan(log_probs).any():
            self.deliver(ValueError("The logits of a token are NaN or infinite"))
            return True
        self._log_probs += log_probs
        self._top += top
        self._pending += tokens
        is_last = row.remaining == 0
        text = ""
        if self.is_streamed or self.text.stop or is_last:
            text = self.text.push(self._pending)
            self._pending = []
        is_last = is_last or self.text.stopped
        if is_last:
            text = self.text.text if not self.is_streamed else text + self.text.flush()
        if is_last or (self.is_streamed and text):
            self._deliver(text, is_last)
        return is_last

    def _deliver(self, text, is_last):
        ids, reason, end = self.text.ids, None, len(self.text.ids)
        if is_last:
            is_stopped = bool(ids) and ids[-1] in self.row.stop_token_ids
            reason = "stop" if is_stopped or self.text.stopped else "length"
            end -= is_stopped
        new = slice(self._sent, end)
        self._sent, scores, self.prompt_scores = end, self.prompt_scores, None
        self.deliver(
            Piece(
                text,
                ids[new],
                self._log_probs[new],
                self._top[new],
                reason,
                len(ids),
                scores,
            )
        )


def jobs_of(call, preprocessor, deliver):
    """Return the jobs of a `Call`.

    Args:
        call: `Call`.
        preprocessor: `VaultGemmaCausalLMPreprocessor`.
        deliver: function of a job's index and a `Piece` or an exception.
    """
    detokenize = detokenizer(call.request, preprocessor)

    def job(i, row):
        return Job(
            row=row,
            model=call.model,
            text=TextStream(detokenize, call.request.stop),
            is_streamed=call.stream,
            scores_prompt=call.scores_prompts,
            deliver=lambda piece: deliver(i, piece),
        )

    return [job(i, row) for i, row in enumerate(call.rows)]
