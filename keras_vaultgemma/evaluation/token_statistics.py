"""Statistics of a model's next-token distributions, without logits of all tokens."""

import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.training.loss import CHUNK_LOGITS

MAX_CHUNK = 1024
"""Largest number of tokens whose logits exist at a time."""


class TokenStatistics:
    """Compiled statistics of the next-token distributions of one model.

    Args:
        model: `VaultGemmaCausalLM`.
        top_k: int or None. Number of tokens that a sampler chooses from; None for all. Defaults to
            None.
    """

    def __init__(self, model, top_k=None):
        self._model = model
        size = model.backbone.vocabulary_size
        self._top_k = None if top_k is None or top_k >= size else top_k
        self._chunk = max(1, min(MAX_CHUNK, CHUNK_LOGITS // size))
        variables = list(model.variables)
        self._hidden_states, self._statistics = (
            backend.compile_function(function, variables, jit_compile=False)
            for function in (self._flat_hidden_states, self._chunk_statistics)
        )

    def __call__(self, token_ids, padding_mask, targets, is_target):
        """Compute the statistics of chosen tokens.

        Args:
            token_ids, padding_mask, targets, is_target: int arrays of shape `[B, T]`. `targets` is
                the id to predict at each position, and `is_target` is 1 where that is asked for.

        Returns:
            Dict of float32 NumPy arrays of shape `[B, T]`, 0 where `is_target` is 0:

            - "loss": -log p(target) in nats;
            - "sampled_loss": -log p(target) if only the `top_k` most likely tokens are sampled
              from, infinite for other targets;
            - "mean", "std": of log p(token) of a token that is drawn from p.
        """
        arrays = [backend.as_argument(np.asarray(x, "int32")) for x in (token_ids, padding_mask)]
        hidden = self._hidden_states(*arrays)
        chosen = np.flatnonzero(is_target).astype("int32")
        flat_targets = np.asarray(targets, "int32").ravel()[chosen]
        found = []
        for start in range(0, len(chosen), self._chunk):
            indices, labels = (x[start : start + self._chunk] for x in (chosen, flat_targets))
            padding = (0, self._chunk - len(indices))
            found.append(
                ops.convert_to_numpy(
                    self._statistics(
                        hidden,
                        backend.as_argument(np.pad(indices, padding)),
                        backend.as_argument(np.pad(labels, padding)),
                    )
                )[:, : len(indices)]
            )
        values = np.zeros((4, np.size(is_target)), "float32")
        if found:
            values[:, chosen] = np.concatenate(found, axis=1)
        names = ("loss", "sampled_loss", "mean", "std")
        return {n: x.reshape(np.shape(is_target)) for n, x in zip(names, values, strict=True)}

    def _flat_hidden_states(self, token_ids, padding_mask):
        x = {"token_ids": token_ids, "padding_mask": padding_mask}
        hidden = self._model.hidden_states(x)
        return ops.reshape(hidden, (-1, hidden.shape[-1]))

    def _chunk_statistics(self, hidden, indices, targets):
        """Return the four statistics, float32 of shape `[4, n]`, of n tokens."""
        logits = self._model.logits(ops.take(hidden, indices, axis=0)[None])[0]
        log_p = backend.log_softmax(logits)
        chosen = ops.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
        p = ops.exp(log_p)
        mean = ops.sum(p * log_p, axis=1)
        variance = ops.sum(p * ops.square(log_p - mean[:, None]), axis=1)
        sampled = chosen
        if self._top_k is not None:
            top = backend.top_k(log_p, self._top_k)[0]
            sampled = chosen - ops.logsumexp(top, axis=1)
            sampled = ops.where(chosen >= top[:, -1], sampled, float("-inf"))
        return ops.stack([-chosen, -sampled, mean, ops.sqrt(variance)])
