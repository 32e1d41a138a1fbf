"""Scoring: how well a language model predicts each token of given rows."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.data.containers import as_plain
from keras_vaultgemma.data.token_ids import check_ids, columns_in_use, pad_rows
from keras_vaultgemma.generation.prompts import read_prompts
from keras_vaultgemma.generation.validation import (
    as_array,
    check_outside_graph,
    check_padded,
    padded_arrays,
)
from keras_vaultgemma.training.loss import cross_entropy, head_terms

BATCH_ROWS = 32
"""Rows that are scored together."""


def token_losses(embedding, hidden_states, targets, weights, with_gradient):
    """Compute the cross-entropy of tokens from hidden states, without logits of all tokens.

    Args:
        embedding: `ReversibleEmbedding`, whose transposed table is the head.
        hidden_states: tensor of shape `[B, T, D]`.
        targets: int tensor of shape `[B * T]`.
        weights: float tensor of shape `[B * T]`, 0 where nothing is predicted.
        with_gradient: bool. False saves the work for gradients.

    Returns:
        Tuple `(total, losses, is_correct)`, as `training.loss.cross_entropy` returns it.
    """
    rows = ops.reshape(hidden_states, (-1, hidden_states.shape[-1]))
    terms = head_terms(embedding, rows)
    return cross_entropy(terms, targets, weights, embedding.logit_soft_cap, with_gradient)


class Scoring:
    """The part of `VaultGemmaCausalLM` that scores tokens."""

    def __init__(self, *args, **kwargs):
        self._compiled_scoring = None  # (ids of the variables, {method: compiled function})
        super().__init__(*args, **kwargs)

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: str = "loss",
        target_ids: Any = None,
    ) -> Any:
        """Compute how well the model predicts each token.

        Args:
            token_ids: what `generate` takes: strings in a list, column or table, chats, ids as an
                array of shape `[B, T]` or as lists, or `{"token_ids", "padding_mask"}`. Rows that
                differ in length are padded on the right.
            padding_mask: array of shape `[B, T]` or None. True at tokens, or the number of each
                token's segment. It belongs to an array of ids. Defaults to None, all tokens.
            scoring_mode: string, "loss" or "logits". Defaults to "loss".
            target_ids: int array of shape `[B, T]` or None. The id to predict at each position.
                Defaults to the next token; then nothing is predicted at a segment's last token.

        Returns:
            float32 NumPy array. For "loss" of shape `[B, T]`: -log p(target) in nats, 0 where
            nothing is predicted. For "logits" of shape `[B, T, V]`.

        Raises:
            ValueError: If `scoring_mode` is another one, there is no row, shapes differ, an id is
                outside the vocabulary (a target, where the mask is true), or the mode is "loss" and
                the embedding is quantized to another mode than int8 or int4.

        Example:

        ```python
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        nats = model.score("The tortoise won the race.")
        ```
        """
        if scoring_mode not in ("loss", "logits"):
            raise ValueError(
                f"`scoring_mode` must be 'loss' or 'logits'. Received: {scoring_mode!r}"
            )
        check_outside_graph("score", token_ids)
        token_ids, segments = self._rows(token_ids, padding_mask)
        if scoring_mode == "logits":
            x = {"token_ids": token_ids, "padding_mask": segments}
            return keras.Model.predict(self, x, verbose=0)
        arrays = (token_ids, segments, *self._targets(token_ids, segments, target_ids))
        # Nothing is predicted from the columns at the end that are padding in all rows.
        columns = columns_in_use(arrays[-1])
        score = self._scoring(self._score_rows)
        batches = [
            [backend.as_argument(array[i : i + BATCH_ROWS, :columns]) for array in arrays]
            for i in range(0, len(token_ids), BATCH_ROWS)
        ]
        losses = np.concatenate([ops.convert_to_numpy(score(*batch)) for batch in batches])
        return np.pad(losses, ((0, 0), (0, token_ids.shape[1] - columns)))

    def _rows(self, inputs, padding_mask):
        """Return ids and segments, int32 of shape `[B, T]` each, of what `score` takes."""
        size = self.backbone.vocabulary_size
        is_padded = isinstance(inputs, Mapping) and "text" not in inputs
        if self.preprocessor is not None and padding_mask is None and not is_padded:
            inputs = as_plain(inputs)
        if isinstance(inputs, Mapping):
            token_ids, segments = padded_arrays(inputs, "token_ids")
            if padding_mask is not None:
                raise ValueError(
                    "`padding_mask` must be None if `token_ids` is a dict, which has its own. "
                    "Received: both"
                )
        elif padding_mask is not None or _is_matrix(inputs):
            token_ids = as_array(inputs, "token_ids")
            segments = np.ones_like(token_ids)
            if padding_mask is not None:
                segments = as_array(padding_mask, "padding_mask")
            if token_ids.ndim == segments.ndim == 1:
                token_ids, segments = token_ids[None], segments[None]
            check_padded(token_ids, segments)
        else:
            rows = read_prompts(inputs, self.preprocessor, size, add_generation_prompt=False).rows
            token_ids, segments = pad_rows(rows, max(map(len, rows)))
        if not token_ids.size:
            raise ValueError(
                "`token_ids` must have at least one row and one token. "
                f"Received: an array of shape {token_ids.shape}"
            )
        check_ids(token_ids, size)
        return token_ids.astype("int32"), segments.astype("int32")

    def _targets(self, token_ids, segments, target_ids):
        """Return targets, int32, and their weights, float32, of shape `[B, T]` each."""
        is_token = segments > 0
        if target_ids is None:
            targets = np.roll(token_ids, -1, axis=1)
            is_scored = is_token & (np.roll(segments, -1, axis=1) == segments)
            is_scored[:, -1] = False
        else:
            targets, is_scored = as_array(target_ids, "target_ids"), is_token
            if targets.shape != token_ids.shape:
                raise ValueError(
                    "`target_ids` must have the shape of `token_ids`. "
                    f"Received: {targets.shape} and {token_ids.shape}"
                )
            what = "`target_ids` where the mask is true"
            check_ids(targets[is_scored], self.backbone.vocabulary_size, what)
        return targets.astype("int32"), is_scored.astype("float32")

    def score_branches(
        self,
        token_ids: Any,
        positions: Any,
        segments: Any,
        branches: Any,
        sources: Any,
        targets: Any,
    ) -> tuple[Any, Any]:
        """Compute how well the model predicts continuations that share contexts, in packed rows.

        A context is a segment of a row, and its continuations are branches of the segment.

        Args:
            token_ids: int32 array of shape `[B, T]`.
            positions: int32 array of shape `[B, T]`, as for `VaultGemmaBackbone.walk`.
            segments: int32 array of shape `[B, T]`, as for `VaultGemmaBackbone.walk`.
            branches: int32 array of shape `[B, T]`, as for `VaultGemmaBackbone.walk`.
            sources: int32 array of shape `[N]`. Indices into the `B * T` tokens: the token after
                which a target is predicted, or -1 where nothing is predicted.
            targets: int32 array of shape `[N]`. Ids to predict.

        Returns:
            Tuple of NumPy arrays of shape `[N]`: -log p of each target in nats, float32, 0 where
            nothing is predicted; and bool, True where the target is the most likely token.
        """
        arrays = (token_ids, positions, segments, branches, sources, targets)
        losses, is_correct = self._scoring(self._score_branches)(*map(backend.as_argument, arrays))
        return ops.convert_to_numpy(losses), ops.convert_to_numpy(is_correct) > 0

    def _scoring(self, method):
        """Return a compiled method; a new one after variables were added or replaced."""
        variables = list(self.variables)
        state = list(map(id, variables))
        if self._compiled_scoring is None or self._compiled_scoring[0] != state:
            self._compiled_scoring = state, {}
        compiled = self._compiled_scoring[1]
        if method.__name__ not in compiled:
            compiled[method.__name__] = backend.compile_function(
                method, variables, jit_compile=False
            )
        return compiled[method.__name__]

    def _score_rows(self, token_ids, padding_mask, targets, weights):
        x = {"token_ids": token_ids, "padding_mask": padding_mask}
        _, losses, _ = token_losses(
            self.backbone.token_embedding,
            self.hidden_states(x),
            ops.reshape(targets, (-1,)),
            ops.reshape(weights, (-1,)),
            with_gradient=False,
        )
        return ops.reshape(losses, ops.shape(weights)) * weights

    def _score_branches(self, token_ids, positions, segments, branches, sources, targets):
        hidden_states = self.backbone.walk(
            token_ids, positions, segments=segments, branches=branches
        )
        rows = ops.reshape(hidden_states, (-1, hidden_states.shape[-1]))
        _, losses, is_correct = token_losses(
            self.backbone.token_embedding,
            ops.take(rows, ops.maximum(sources, 0), axis=0),
            targets,
            ops.cast(sources >= 0, "float32"),
            with_gradient=False,
        )
        return losses, is_correct


def _is_matrix(x):
    return hasattr(x, "dtype") and len(x.shape) == 2 and not hasattr(x, "row_splits")
