"""Extraction of suffixes of records from a model, given their prefixes."""

from typing import NamedTuple

import keras_hub
import numpy as np

from keras_vaultgemma.evaluation.texts import special_ids
from keras_vaultgemma.evaluation.token_statistics import TokenStatistics
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.models.pieces import with_piece_logits

BATCH_ROWS = 128
"""Windows that are computed together, and whose results are stored together."""


class Extracted(NamedTuple):
    """What a model reveals about N suffixes.

    Attributes:
        distances: float array `[N]`. Edit distance of the greedy continuation and the suffix, in
            tokens, divided by the suffix's length.
        log_probabilities: float array `[N]`. Log-probability that one sampled continuation is the
            suffix.
    """

    distances: np.ndarray
    log_probabilities: np.ndarray


def extract(model, windows, prefix_length, top_k, parts, label, verbose):
    """Let a model continue the prefixes of windows.

    Args:
        model: `VaultGemmaCausalLM`.
        windows: int array `[N, P + S]`. Prefixes of `prefix_length` tokens and suffixes.
        prefix_length: int. P.
        top_k: int or None. Number of tokens that sampling chooses from.
        parts: `Parts`.
        label: string. Name of the computation.
        verbose: bool. True for a progress bar.

    Returns:
        `Extracted`.
    """
    if not len(windows):
        return Extracted(np.zeros(0), np.zeros(0))
    start = special_ids(model)[0]
    generator = Generator(with_piece_logits(model), keras_hub.samplers.GreedySampler())
    statistics = TokenStatistics(model, top_k)

    def compute(windows):
        # All batches have one shape, for which functions are compiled.
        padded = np.resize(windows, (rows_per_batch, windows.shape[1]))
        rows = np.pad(padded, ((0, 0), (len(start), 0)), constant_values=start[0] if start else 0)
        suffixes = padded[:, prefix_length:]
        is_target = np.zeros(rows[:, 1:].shape, "int32")
        is_target[:, -suffixes.shape[1] :] = 1
        found = statistics(rows[:, :-1], np.ones_like(is_target), rows[:, 1:], is_target)
        losses = found["sampled_loss"].sum(axis=1, dtype="float64")
        prompts = rows[:, : len(start) + prefix_length].tolist()
        tokens = generator.generate(prompts, [suffixes.shape[1]] * len(prompts)).tokens
        count = len(windows)
        return {
            "log_probabilities": -losses[:count],
            "distances": edit_distances(tokens[:count], suffixes[:count].tolist()),
        }

    rows_per_batch = min(BATCH_ROWS, len(windows))
    batches = [(windows[i : i + rows_per_batch],) for i in range(0, len(windows), rows_per_batch)]
    options = [prefix_length, top_k, start]
    results = parts.compute(compute, batches, model, options, label, verbose)
    return Extracted(
        *(np.concatenate([result[name] for result in results]) for name in Extracted._fields)
    )


def edit_distances(rows, others):
    """Return the edit distance of each two rows of ids, divided by the longer one's length."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError(
            f"Edit distances need rapidfuzz: pip install keras-vaultgemma[eval] ({error})"
        ) from error
    pairs = zip(rows, others, strict=True)
    return np.array([Levenshtein.normalized_distance(row, other) for row, other in pairs])
