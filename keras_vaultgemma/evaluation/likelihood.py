"""How well a model predicts text that it was not trained on."""

import math
import re
from typing import NamedTuple

import numpy as np


class Likelihood(NamedTuple):
    """What a model makes of some labels.

    Attributes:
        nats: sum of -log p(label).
        tokens: number of labels, `<eos>` among them.
        bytes: of UTF-8 that the labels stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self):
        """exp of the mean loss; infinite where that is too large, for it depends on how text is cut into tokens."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else (math.nan if math.isnan(mean) else math.inf)

    @property
    def bits_per_byte(self):
        """What the text would take when compressed with the model, whatever its tokens are."""
        return self.nats / math.log(2) / self.bytes

    def __str__(self):
        return f"perplexity {self.perplexity:.4g}, {self.bits_per_byte:.4f} bits per byte"


def measure(model, x, y, sample_weight):
    """The `Likelihood` of ids and labels as `TextRecords.tokenize` gives them.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        x, y, sample_weight: as for `fit`; labels whose weight is 0 do not count.

    Raises:
        ValueError: where no label counts.
    """
    is_label = sample_weight > 0
    size = _bytes_of(y[is_label], model.preprocessor.tokenizer)
    if not size:
        raise ValueError(
            "Held-out data must have a label that stands for text. Received: none, all were cut away"
        )
    # Rows of nothing but prompts are not computed.
    rows = is_label.any(axis=1)
    nats = model.score(x["token_ids"][rows], x["padding_mask"][rows], target_ids=y[rows])
    return Likelihood(float(nats[is_label[rows]].sum(dtype="float64")), int(is_label.sum()), size)


def _bytes_of(labels, tokenizer):
    """Bytes of UTF-8 that ids stand for, all together."""
    size, control = 0, set(tokenizer.special_token_ids)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if label not in control:
            piece = tokenizer.id_to_token(int(label))
            is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
            size += int(count) * (1 if is_byte else len(piece.replace("\u2581", " ").encode()))
    return size
