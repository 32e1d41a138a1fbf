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

SAMPLE = 1000
"""Windows whose edit distance is always computed. Of others, only that it is no match."""


class Extracted(NamedTuple):
    """What a model reveals about N suffixes.

    Attributes:
        distances: float array `[N]`. Edit distance of the greedy continuation and the suffix, in
            tokens, divided by the suffix's length; infinite if it is larger than `approximate` and
            not in the sample.
        log_probabilities: float array `[N]`. Log-probability that one sampled continuation is the
            suffix.
        median_distance: float. Median of the distances in a random sample.
    """

    distances: np.ndarray
    log_probabilities: np.ndarray
    median_distance: float


class Extractor:
    """Greedy and probabilistic extraction from one model.

    Most windows are no match after a few tokens, and decoding takes most of the time. So all are
    continued by a few tokens, and then only those that can still match, and a random sample.

    Args:
        model: `VaultGemmaCausalLM`.
        prefix_length, suffix_length: int. P and S.
        approximate: float. Largest distance of a match.
        top_k: int or None. Number of tokens that sampling chooses from.
        parts: `Parts`.
        verbose: bool. True for progress bars.
    """

    def __init__(self, model, prefix_length, suffix_length, approximate, top_k, parts, verbose):
        self._model, self._parts, self._verbose = model, parts, verbose
        self._prefix_length, self._suffix_length = prefix_length, suffix_length
        self._top_k, self._start = top_k, special_ids(model)[0]
        self._edits = int(approximate * suffix_length + 1e-9)
        self._first = min(suffix_length, 2 * self._edits + 2)
        self._statistics = TokenStatistics(model, top_k)
        self._generator = Generator(with_piece_logits(model), keras_hub.samplers.GreedySampler())

    def __call__(self, windows, label):
        """Return `Extracted` for windows, an int array `[N, P + S]`."""
        suffixes = windows[:, self._prefix_length :]
        found = self._compute(self._begin, [windows], f"{label}: first tokens")
        tokens = found["tokens"]
        is_sampled = np.random.default_rng(0).permutation(len(windows)) < SAMPLE
        rest = np.flatnonzero(is_sampled | self._may_match(tokens, suffixes))
        distances = np.full(len(windows), np.inf)
        continued = tokens[rest]
        if self._first < self._suffix_length:
            arrays = [windows[rest], continued]
            more = self._compute(self._continue, arrays, f"{label}: other tokens")["tokens"]
            continued = np.concatenate([continued, more], axis=1)
        distances[rest] = edit_distances(continued.tolist(), suffixes[rest].tolist())
        return Extracted(
            distances, found["log_probabilities"], float(np.median(distances[is_sampled]))
        )

    def _compute(self, function, arrays, label):
        """Return the concatenated results of a function of batches of rows."""
        size = min(BATCH_ROWS, len(arrays[0]))

        def padded(*batch):
            # All batches have one shape, for which functions are compiled.
            results = function(*(np.resize(x, (size, x.shape[1])) for x in batch))
            return {name: x[: len(batch[0])] for name, x in results.items()}

        batches = [tuple(x[i : i + size] for x in arrays) for i in range(0, len(arrays[0]), size)]
        options = [self._prefix_length, self._first, self._top_k, self._start]
        results = self._parts.compute(padded, batches, self._model, options, label, self._verbose)
        return {name: np.concatenate([x[name] for x in results]) for name in results[0]}

    def _begin(self, windows):
        """Return the suffixes' log-probabilities and the first tokens of greedy continuations."""
        rows = np.concatenate([np.tile(self._start, (len(windows), 1)), windows], axis=1)
        rows = rows.astype("int32")
        is_target = np.zeros(rows[:, 1:].shape, "int32")
        is_target[:, -self._suffix_length :] = 1
        found = self._statistics(rows[:, :-1], np.ones_like(is_target), rows[:, 1:], is_target)
        log_probabilities = -found["sampled_loss"].sum(axis=1, dtype="float64")
        prompts = rows[:, : -self._suffix_length]
        return {
            "log_probabilities": log_probabilities,
            "tokens": self._greedy(prompts, self._first),
        }

    def _continue(self, windows, tokens):
        """Return the other tokens of greedy continuations."""
        starts = np.tile(self._start, (len(windows), 1)).astype("int32")
        prompts = np.concatenate([starts, windows[:, : self._prefix_length], tokens], axis=1)
        return {"tokens": self._greedy(prompts, self._suffix_length - self._first)}

    def _greedy(self, prompts, count):
        generated = self._generator.generate(prompts.tolist(), [count] * len(prompts))
        return np.array(generated.tokens, "int32")

    def _may_match(self, tokens, suffixes):
        """Return True for rows whose first tokens are few edits from a beginning of the suffix."""
        distance, count, edits = _levenshtein().distance, tokens.shape[1], self._edits
        ends = range(max(0, count - edits), count + edits + 1)
        return np.array(
            [
                any(distance(row, suffix[:end], score_cutoff=edits) <= edits for end in ends)
                for row, suffix in zip(tokens.tolist(), suffixes.tolist(), strict=True)
            ]
        )


def edit_distances(rows, others):
    """Return the edit distance of each two rows of ids, divided by the longer one's length."""
    distance = _levenshtein().normalized_distance
    return np.array([distance(row, other) for row, other in zip(rows, others, strict=True)])


def _levenshtein():
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError(
            f"Edit distances need rapidfuzz: pip install 'keras-vaultgemma[report]' ({error})"
        ) from error
    return Levenshtein
