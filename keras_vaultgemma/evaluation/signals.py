"""Numbers that membership is guessed from: one of each kind for every record."""

import numpy as np

from keras_vaultgemma.data.token_ids import pad_rows
from keras_vaultgemma.evaluation.texts import compressed_size
from keras_vaultgemma.evaluation.token_statistics import TokenStatistics

BATCH_TOKENS = 4096
"""Tokens that are computed together, and whose results are stored together."""

SIGNALS = ("loss", "min_k", "min_k_plus_plus", "zlib")


def token_losses(model, rows, parts, label, verbose):
    """Compute how well a model predicts the ids of rows after their first.

    Args:
        model: `VaultGemmaCausalLM`.
        rows: list of N lists of at least two ids, as the model is trained on them.
        parts: `Parts`.
        label: string. Name of the computation.
        verbose: bool. True for a progress bar.

    Returns:
        List of N float arrays `[2, T - 1]`: -log p of each id in nats, and how much that is above
        its expectation, in standard deviations.

    Raises:
        ValueError: If a loss is not finite.
    """
    statistics = TokenStatistics(model)

    def compute(ids, mask):
        found = statistics(ids[:, :-1], mask[:, :-1], ids[:, 1:], mask[:, 1:])
        excess = found["loss"] + found["mean"]
        surprise = np.divide(excess, found["std"], np.zeros_like(excess), where=found["std"] > 0)
        return {"losses": np.stack([found["loss"], surprise], axis=1)}

    batches = _batches([len(row) for row in rows])
    arrays = []
    for indices, length, count in batches:
        # All batches of a length have one shape, for which functions are compiled.
        padded = pad_rows([rows[i] for i in indices], length)
        arrays.append(tuple(np.resize(x, (count, length)) for x in padded))
    results = parts.compute(compute, arrays, model, [], label, verbose)
    found = [None] * len(rows)
    for (indices, _, _), result in zip(batches, results, strict=True):
        for i, losses in zip(indices, result["losses"], strict=False):
            found[i] = losses[:, : len(rows[i]) - 1].astype("float64")
            if not np.isfinite(found[i]).all():
                raise ValueError(
                    "The model's losses must be finite. Received: one that is not, as after a "
                    "training that diverged"
                )
    return found


def record_signals(losses, contents, k):
    """Compute the signals of records from `token_losses`. Higher ones speak for membership.

    Args:
        losses: list of N arrays, as `token_losses` returns them.
        contents: list of N bytes, the texts.
        k: float in (0, 1]. Fraction of tokens of min-k % and min-k++.

    Returns:
        Dict of float arrays `[N]`, one for each of `SIGNALS`.
    """
    sizes = [compressed_size(content) for content in contents]
    return dict(
        zip(
            SIGNALS,
            (
                np.array([-nats.mean() for nats, _ in losses]),
                np.array([-_largest(nats, k).mean() for nats, _ in losses]),
                np.array([-_largest(surprise, k).mean() for _, surprise in losses]),
                np.array([-x[0].sum() / n for x, n in zip(losses, sizes, strict=True)]),
            ),
            strict=True,
        )
    )


def _batches(lengths):
    """Return tuples `(indices, padded length, number of rows)` of rows of similar lengths.

    Padded lengths are powers of two and 1.5 times these, so that few shapes are compiled.
    """
    groups, found = {}, []
    for i in np.argsort(lengths, kind="stable"):
        length = 8
        while length < lengths[i]:
            length = length * 3 // 2 if length & (length - 1) == 0 else length // 3 * 4
        groups.setdefault(length, []).append(int(i))
    for length, indices in groups.items():
        longest = max(lengths[i] for i in indices) if length > max(lengths) else length
        count = max(1, min(BATCH_TOKENS // length, len(indices)))
        found += [(indices[i : i + count], longest, count) for i in range(0, len(indices), count)]
    return found


def _largest(values, fraction):
    return np.sort(values)[-max(1, int(fraction * len(values))) :]
