"""How well a language model predicts each token of given rows."""

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.data.text_inputs import as_texts
from keras_vaultgemma.data.token_ids import check_ids, pad_rows
from keras_vaultgemma.training.loss import check_table, cross_entropy, head_factors

ROWS = 32
"""Rows that are computed at a time."""


class Scorer:
    """A compiled `_score_rows` of one model, good for the variables that this has now (LoRA, quantisation)."""

    def __init__(self, model):
        self.variables = list(model.variables)
        self._compiled = backend.compile_function(model._score_rows, self.variables)

    def call(self, *arrays):
        return self._compiled(*map(backend.as_argument, arrays))


class Scoring:
    """The part of `VaultGemmaCausalLM` that scores tokens, by the loss that needs no logits (loss.py)."""

    _scorer = None

    def score(self, token_ids, padding_mask=None, scoring_mode="loss", target_ids=None):
        """How well the model predicts each token.

        Args:
            token_ids: strings, or int [B, T].
            padding_mask: [B, T], true at tokens, or the number of each token's segment; all true if None.
            scoring_mode: "loss" or "logits".
            target_ids: int [B, T], what to predict at each place. Defaults to the next token, and then nothing is
                predicted at a segment's last token.

        Returns:
            NumPy float32. "loss": [B, T], -log p(target) in nats, 0 where nothing is predicted. "logits": [B, T, V].

        Raises:
            ValueError: for another mode, ids outside the vocabulary (of targets, where the mask is true), or "loss" of
                an embedding that is quantized to something else than int8.
        """
        if scoring_mode not in ("loss", "logits"):
            raise ValueError(
                f"`scoring_mode` must be 'loss' or 'logits'. Received: {scoring_mode!r}"
            )
        if self.preprocessor is not None and not hasattr(token_ids, "dtype"):
            texts, _ = as_texts(token_ids)
            rows = self.preprocessor.tokenize_prompts(texts)
            token_ids, padding_mask = pad_rows(rows, max(map(len, rows)))
        token_ids = np.asarray(ops.convert_to_numpy(token_ids), "int32")
        check_ids(token_ids, self.backbone.vocabulary_size)
        mask = (
            np.ones_like(token_ids)
            if padding_mask is None
            else np.asarray(ops.convert_to_numpy(padding_mask))
        )
        x = {"token_ids": token_ids, "padding_mask": mask.astype("int32")}
        if scoring_mode == "logits":
            return keras.Model.predict(self, x, verbose=0)
        if target_ids is None:
            target_ids, weights = (
                np.roll(token_ids, -1, axis=1),
                (np.roll(mask, -1, axis=1) == mask) & (mask > 0),
            )
            weights[:, -1] = False
        else:
            target_ids, weights = np.asarray(ops.convert_to_numpy(target_ids)), mask > 0
            check_ids(
                target_ids[weights],
                self.backbone.vocabulary_size,
                "`target_ids` where the mask is true",
            )
        check_table(self.backbone.token_embedding)
        if self._scorer is None or [id(v) for v in self._scorer.variables] != [
            id(v) for v in self.variables
        ]:
            self._scorer = Scorer(self)
        arrays = (
            x["token_ids"],
            x["padding_mask"],
            target_ids.astype("int32"),
            weights.astype("float32"),
        )
        batches = [
            [array[i : i + ROWS] for array in arrays] for i in range(0, len(token_ids), ROWS)
        ]
        return np.concatenate(
            [ops.convert_to_numpy(self._scorer.call(*batch)) for batch in batches]
        )

    def _score_rows(self, token_ids, padding_mask, targets, weights):
        """[B, T], weighted losses."""
        hidden_states = self.backbone({"token_ids": token_ids, "padding_mask": padding_mask})
        targets, flat = ops.reshape(targets, (-1,)), ops.reshape(weights, (-1,))
        _, losses, _ = self._cross_entropy(hidden_states, targets, flat, with_gradient=False)
        return ops.reshape(losses, ops.shape(weights)) * weights

    def _cross_entropy(self, hidden_states, targets, weights, with_gradient):
        """`loss.cross_entropy` of hidden states [B, T, D] and flat targets and weights [B * T]."""
        rows = ops.reshape(hidden_states, (-1, hidden_states.shape[-1]))
        embedding = self.backbone.token_embedding
        factors = head_factors(embedding, rows)
        return cross_entropy(factors, targets, weights, embedding.logit_soft_cap, with_gradient)
