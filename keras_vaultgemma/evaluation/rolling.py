"""Likelihood of whole texts, in windows of the model's positions."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable

import keras
import numpy as np

from keras_vaultgemma._validation import check_choice
from keras_vaultgemma.evaluation.likelihood import Likelihood
from keras_vaultgemma.evaluation.pairs import TRUNCATIONS, positions_of, score_ids, tokenizer_of
from keras_vaultgemma.evaluation.results import Result


@dataclasses.dataclass(frozen=True)
class RollingLikelihood(Result):
    """Likelihood of N texts, each by itself.

    Attributes:
        log_probs: tuple of N floats. Log-probability of each text, in nats.
        tokens: int. Number of tokens of all texts.
        bytes: int. Number of UTF-8 bytes of all texts.
        words: int. Number of pieces between white space, as the harness counts words.
        windows: int. Number of windows that the texts were cut into.

    Example:

    ```python
    from keras_vaultgemma.evaluation import RollingLikelihood

    found = RollingLikelihood(log_probs=(-20.0,), tokens=10, bytes=40, words=8, windows=1)
    print(found.bits_per_byte)  # 0.7213...
    ```
    """

    log_probs: tuple[float, ...]
    tokens: int
    bytes: int
    words: int
    windows: int

    @property
    def likelihood(self) -> Likelihood:
        """`Likelihood` of all texts together: perplexity of a token, and bits per byte."""
        return Likelihood(-math.fsum(self.log_probs), self.tokens, self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte."""
        return self.likelihood.bits_per_byte

    @property
    def word_perplexity(self) -> float:
        """Exponential of the mean loss of a word."""
        return self.likelihood._replace(tokens=self.words).perplexity

    @property
    def byte_perplexity(self) -> float:
        """Exponential of the mean loss of a byte."""
        return self.likelihood._replace(tokens=self.bytes).perplexity


def measure_rolling(
    model: keras.Model,
    texts: Iterable[str],
    *,
    truncation: str = "keep_bos",
    score_bos: bool = False,
    max_length: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> RollingLikelihood:
    """Measure the likelihood of whole texts, each token of which is predicted once.

    A text that is longer than the model's positions is cut into windows. A window predicts as many
    tokens as there are positions, after a single token of context. The last one, which predicts the
    rest, has as much context as fits.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        texts: iterable of strings.
        truncation: string. What a window after the first begins with: "lm_eval" with its context,
            as in lm-evaluation-harness; "keep_bos" with `<bos>` and its context. Defaults to
            "keep_bos".
        score_bos: bool. If True, add the log-probability of `<bos>` after `<bos>` to each text, as
            the harness's model "hf" does. Defaults to False.
        max_length: int. Number of positions. Defaults to the model's.
        checkpoint: path of a folder or None, as for `score_pairs`.
        verbose: bool. If True, show a progress bar on a terminal. Defaults to True.

    Returns:
        `RollingLikelihood`.

    Raises:
        ValueError: If the texts have no byte, or an argument is out of its range.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    texts = ["Once upon a time a Wolf met a Lamb.", "The Hare slept."]
    print(evaluation.measure_rolling(model, texts, verbose=False).likelihood)
    ```
    """
    texts = list(texts)
    if not any(texts):
        raise ValueError(f"`texts` must have at least one byte. Received: {len(texts)} texts")
    check_choice("truncation", truncation, TRUNCATIONS)
    tokenizer, length = tokenizer_of(model), positions_of(model, max_length)
    bos, rows = tokenizer.start_token_id, tokenizer.tokenize(texts)
    windows = [
        windows_of([bos, *row] if score_bos else row, bos, length, truncation) for row in rows
    ]
    flat = [window for found in windows for window in found]
    log_probs, _ = score_ids(model, flat, checkpoint, verbose)
    ends = np.cumsum([len(found) for found in windows])
    return RollingLikelihood(
        log_probs=tuple(float(part.sum()) for part in np.split(log_probs, ends[:-1])),
        tokens=sum(len(predicted) for _, predicted in flat),
        bytes=sum(len(text.encode()) for text in texts),
        words=sum(len(re.split(r"\s+", text)) for text in texts),
        windows=len(flat),
    )


def windows_of(row, bos, max_length, truncation):
    """Return the windows `(context, continuation)`, tuples of ids, that predict each id once.

    Args:
        row: list of ids.
        bos: int. Id of `<bos>`.
        max_length: int. Most inputs of a window; its last id is predicted only.
        truncation: string, one of `TRUNCATIONS`.
    """
    windows = [((bos,), tuple(row[:max_length]))] if row else []
    kept = (bos,) if truncation == "keep_bos" else ()
    size = max(1, max_length - len(kept))
    for start in range(max_length, len(row), size):
        end = min(start + size, len(row))
        # The last window may be short, and has all the context that fits.
        windows.append(((*kept, *row[end - size - 1 : start]), tuple(row[start:end])))
    return windows
