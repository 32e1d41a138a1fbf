"""A model whose embedding has more rows than its vocabulary has pieces.

Tools pad embeddings to multiples of 64 or 128 rows, for speed. No text is tokenized as the ids of
such rows, and the ids have no text.
"""

import numpy as np
from keras import ops


def piece_count(preprocessor):
    """Return the number of pieces of a preprocessor's vocabulary; None without a vocabulary."""
    tokenizer = getattr(preprocessor, "tokenizer", None)
    # A tokenizer that Keras deserializes gets its vocabulary later.
    if tokenizer is None or getattr(tokenizer, "proto", None) is None:
        return None
    return tokenizer.vocabulary_size()


def check_piece_count(preprocessor, rows):
    """Raise ValueError if a vocabulary has more pieces than the embedding has rows."""
    count = piece_count(preprocessor)
    if count is not None and count > rows:
        raise ValueError(
            f"The vocabulary must have at most {rows} pieces, the `vocabulary_size` of the model. "
            f"Received: {count}; {preprocessor.tokenizer.id_to_token(rows)!r} is the first without "
            "an embedding. Resize the model's embeddings where the tokens were added "
            "(`resize_token_embeddings` in transformers) and save it again"
        )


def with_piece_logits(model):
    """Return a causal language model in which ids without a piece have the logit -inf.

    Args:
        model: `VaultGemmaCausalLM`. Returned as it is if every id has a piece, or if it has no
            vocabulary.
    """
    count = piece_count(model.preprocessor)
    if count is None or count >= model.backbone.vocabulary_size:
        return model
    return _PieceLogits(model, count)


class _PieceLogits:
    """A causal language model with logits for generation."""

    def __init__(self, model, count):
        self._model = model
        self._is_piece = np.arange(model.backbone.vocabulary_size) < count

    def __getattr__(self, name):
        return getattr(self._model, name)

    def logits(self, hidden_states):
        logits = self._model.logits(hidden_states)
        return ops.where(ops.convert_to_tensor(self._is_piece), logits, float("-inf"))
