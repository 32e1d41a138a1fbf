"""Log-probabilities of the tokens of a prompt."""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_vaultgemma import backend

MIN_LENGTH = 64
"""Lengths are padded to this times a power of two, so that few functions are compiled."""

CHUNK = 64
"""Tokens whose logits are computed together: 66 MB for a vocabulary of 256,000."""


class PromptScores(NamedTuple):
    """How well a model predicts each token of a prompt but the first.

    Attributes:
        log_probs: list of n - 1 floats, in nats.
        top: list of n - 1 pairs `(ids, log_probs)`, the most likely tokens instead.
    """

    log_probs: list
    top: list


class PromptScorer:
    """Compiled scoring of prompts.

    Args:
        model: as for `generator.Generator`.
        compile: function like `backend.compile_function` for the model's variables.
        top: int. Number of most likely tokens.
    """

    def __init__(self, model, compile, top):
        self._model, self._top = model, top
        self._read, self._predict = compile(self._hidden), compile(self._scores)

    def __call__(self, ids):
        """Return the `PromptScores` of a list of n ids."""
        count, length = len(ids) - 1, MIN_LENGTH
        while length < count:
            length *= 2
        token_ids, mask = np.zeros((1, length), "int32"), np.zeros((1, length), "int32")
        token_ids[0, :count], mask[0, :count] = ids[:-1], 1
        targets = np.zeros(length, "int32")
        targets[:count] = ids[1:]
        hidden = self._read(backend.as_argument(token_ids), backend.as_argument(mask))
        scores = PromptScores([], [])
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            found = self._predict(
                hidden, backend.as_argument(np.int32(start)), backend.as_argument(targets[part])
            )
            log_probs, ids, top = (ops.convert_to_numpy(x)[: count - start] for x in found)
            scores.log_probs.extend(log_probs.tolist())
            scores.top.extend(zip(ids, top, strict=True))
        return scores

    def _hidden(self, token_ids, mask):
        return self._model.hidden_states({"token_ids": token_ids, "padding_mask": mask})[0]

    def _scores(self, hidden, start, targets):
        """Return log-probabilities [n], and the most likely ids and theirs, [n, top] each.

        Args:
            hidden: tensor [T, D].
            start: int32 scalar. The first of n hidden states to read.
            targets: int32 [n].
        """
        hidden = ops.slice(hidden, (start, start * 0), (targets.shape[0], hidden.shape[1]))
        logits = self._model.logits(hidden[None])[0]
        log_probs = logits - ops.logsumexp(logits, axis=1, keepdims=True)
        top, ids = backend.top_k(log_probs, min(self._top, logits.shape[1]))
        return ops.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0], ids, top
