"""Numbers that membership is guessed from: one of each kind for every record."""

import numpy as np

from keras_vaultgemma.data.token_ids import pad_rows
from keras_vaultgemma.evaluation.texts import compressed_size, special_ids
from keras_vaultgemma.evaluation.token_statistics import TokenStatistics

BATCH_TOKENS = 4096
"""Tokens that are computed together, and whose results are stored together."""


def record_signals(model, rows, contents, k, parts, label, verbose):
    """Compute the signals of records. Higher ones speak for membership.

    Args:
        model: `VaultGemmaCausalLM`.
        rows: list of N sequences of ids, without `<bos>` and `<eos>`.
        contents: list of N bytes, the texts.
        k: float in (0, 1]. Fraction of tokens of min-k % and min-k++.
        parts: `Parts`.
        label: string. Name of the computation.
        verbose: bool. True for a progress bar.

    Returns:
        Dict of float arrays `[N]`: "loss", "min_k", "min_k_plus_plus" and "zlib".
    """
    statistics = TokenStatistics(model)
    losses, standardised = {}, {}

    def compute(ids, mask):
        # The last position is where nothing is predicted.
        is_target = mask * np.roll(mask, -1, axis=1)
        is_target[:, -1] = 0
        found = statistics(ids, mask, np.roll(ids, -1, axis=1), is_target)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = np.where(
                found["std"] > 0, (found["loss"] + found["mean"]) / found["std"], 0.0
            )
        return {"loss": found["loss"], "surprise": surprise.astype("float32")}

    start, end = special_ids(model)
    longest = _longest_row(model)
    rows = [[*start, *row, *end][:longest] for row in rows]
    batches = _batches(rows)
    arrays = [pad_rows([rows[i] for i in indices], length) for indices, length, _ in batches]
    arrays = [
        tuple(np.resize(x, (count, x.shape[1])) for x in pair)
        for pair, (_, _, count) in zip(arrays, batches, strict=True)
    ]
    for (indices, _, _), result in zip(
        batches, parts.compute(compute, arrays, model, [], label, verbose), strict=True
    ):
        for j, i in enumerate(indices):
            count = max(1, len(rows[i]) - 1)
            losses[i] = result["loss"][j, :count].astype("float64")
            standardised[i] = result["surprise"][j, :count].astype("float64")
    losses = [losses[i] for i in range(len(rows))]
    standardised = [standardised[i] for i in range(len(rows))]
    return {
        "loss": np.array([-x.mean() for x in losses]),
        "min_k": np.array([-_largest(x, k).mean() for x in losses]),
        "min_k_plus_plus": np.array([-_largest(x, k).mean() for x in standardised]),
        "zlib": np.array(
            [-x.sum() / compressed_size(text) for x, text in zip(losses, contents, strict=True)]
        ),
    }


def _longest_row(model):
    longest = model.backbone.max_sequence_length
    return longest if model.preprocessor is None else model.preprocessor.sequence_length + 1


def _batches(rows):
    """Return `(indices, length, number of rows)` of batches of similar lengths.

    Lengths are powers of two and 1.5 times these, so that few shapes are compiled.
    """
    batches, order = {}, np.argsort([len(row) for row in rows], kind="stable")
    for i in order:
        length = 8
        while length < len(rows[i]):
            length = length * 3 // 2 if length & (length - 1) == 0 else length // 3 * 4
        batches.setdefault(length, []).append(int(i))
    found = []
    for length, indices in batches.items():
        count = max(1, BATCH_TOKENS // length)
        found += [(indices[i : i + count], length, count) for i in range(0, len(indices), count)]
    return found


def _largest(values, fraction):
    count = max(1, int(fraction * len(values)))
    return np.sort(values)[-count:]
