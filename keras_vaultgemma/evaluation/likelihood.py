"""Likelihood of held-out text under a model: perplexity and bits per byte."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np


class Likelihood(NamedTuple):
    """Likelihood of labels under a model.

    Attributes:
        nats: float. Sum of `-log p(label)`.
        tokens: int. Number of labels, including `<eos>`.
        bytes: int. Number of UTF-8 bytes of the text that the labels stand for.

    Example:

    ```python
    from keras_vaultgemma.evaluation import Likelihood

    likelihood = Likelihood(nats=20.0, tokens=10, bytes=40)
    print(likelihood)  # perplexity 7.389, 0.7213 bits per byte
    ```
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss of a label, infinite if that is 700 nats or more.

        It depends on the tokenizer; compare models with different ones by `bits_per_byte`.
        """
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else (math.nan if math.isnan(mean) else math.inf)

    @property
    def bits_per_byte(self) -> float:
        """Size of the text when compressed with the model, in bits per byte, for any tokenizer."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as a dict for JSON, with None where a number is not finite."""
        figures = {
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            **self._asdict(),
        }
        return {name: x if math.isfinite(x) else None for name, x in figures.items()}

    def __str__(self):
        return f"perplexity {self.perplexity:.4g}, {self.bits_per_byte:.4f} bits per byte"


def measure(
    model: keras.Model,
    x: Mapping[str, np.ndarray],
    y: np.ndarray,
    sample_weight: np.ndarray,
) -> Likelihood:
    """Compute the likelihood of labels under a model.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        x: dict of "token_ids" and "padding_mask", int arrays of shape `[B, T]`, as for `fit`.
        y: int array of shape `[B, T]`. Labels.
        sample_weight: array of shape `[B, T]`. Labels of weight 0 do not count; the others count
            once each.

    Returns:
        `Likelihood`.

    Raises:
        ValueError: If no label of nonzero weight stands for text.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    x, y, sample_weight = model.preprocessor(["Once upon a time a Wolf met a Lamb."])
    print(evaluation.measure(model, x, y, sample_weight))
    ```
    """
    is_label = np.asarray(sample_weight) > 0
    y = np.asarray(y)
    size = _utf8_length(y[is_label], model.preprocessor.tokenizer)
    if not size:
        raise ValueError(
            "Held-out data must have a label that stands for text and is not truncated. "
            "Received: none"
        )
    # Skip rows without a label, such as those that contain only a prompt.
    rows = is_label.any(axis=1)
    nats = model.score(x["token_ids"][rows], x["padding_mask"][rows], target_ids=y[rows])
    return Likelihood(float(nats[is_label[rows]].sum(dtype="float64")), int(is_label.sum()), size)


def _utf8_length(labels, tokenizer):
    """Return the total number of UTF-8 bytes that token ids stand for."""
    size, special = 0, set(tokenizer.special_token_ids)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if label not in special:
            piece = tokenizer.id_to_token(int(label))
            is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
            size += int(count) * (1 if is_byte else len(piece.replace("\u2581", " ").encode()))
    return size
