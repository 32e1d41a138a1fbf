"""Differences between members and controls that have nothing to do with the model.

If a classifier that never saw the model tells the two apart, then an attack that seems to detect
membership may detect another source, topic or time.
"""

from dataclasses import dataclass

import numpy as np

from keras_vaultgemma.evaluation.results import Result
from keras_vaultgemma.evaluation.roc import auc

FOLDS = 5

DEVIATIONS = 4.0
"""Standard deviations of Mann and Whitney's statistic above 0.5 from which an AUC is no chance.

Cross-validated areas vary 1.4 times as much, because the folds share rows.
"""


@dataclass(frozen=True)
class DistributionShift(Result):
    """How well members and controls can be told apart without the model. 0.5 is guessing.

    Attributes:
        words: float. AUC of a naive Bayes classifier of the tokens, cross-validated.
        length: float. AUC of the number of tokens, or of its opposite if that is larger.
        reference_loss: float or None. Likewise of the reference model's loss.
        is_found: bool. True if one of them is above 0.5 by more than chance.

    References:
        - [Das et al., 2024](https://arxiv.org/abs/2406.16201)
    """

    words: float
    length: float
    reference_loss: float | None
    is_found: bool


def find_shift(rows, is_member, reference_loss=None):
    """Return the `DistributionShift` between members and controls.

    Args:
        rows: list of N lists of ids.
        is_member: bool array `[N]`.
        reference_loss: float array `[N]`, or None. Loss of a model that saw neither.
    """

    def area(scores):
        return float(auc(scores[is_member], scores[~is_member]))

    areas = [area(_word_scores(rows, is_member)), area(np.array([len(row) for row in rows]))]
    areas += [] if reference_loss is None else [area(reference_loss)]
    areas[1:] = [max(x, 1 - x) for x in areas[1:]]
    members, controls = np.sum(is_member), np.sum(~is_member)
    deviation = np.sqrt((members + controls + 1) / (12 * members * controls))
    is_found = bool(max(areas) > 0.5 + DEVIATIONS * deviation)
    return DistributionShift(*areas[:2], areas[2] if areas[2:] else None, is_found)


def _word_scores(rows, is_member):
    """Return the mean log-odds of each row's tokens, counted in the rows of other folds."""
    size = 1 + max(max(row) for row in rows)
    # Members and controls are both spread over all folds.
    folds = np.zeros(len(rows), int)
    for kind in (is_member, ~is_member):
        folds[kind] = np.random.default_rng(0).permutation(kind.sum()) % FOLDS
    scores = np.zeros(len(rows))
    for fold in range(FOLDS):
        log_p = []
        for kind in (is_member, ~is_member):
            chosen = np.flatnonzero(kind & (folds != fold))
            ids = np.concatenate([rows[i] for i in chosen]) if len(chosen) else np.zeros(0, int)
            counts = np.bincount(ids, minlength=size) + 1.0
            log_p.append(np.log(counts / counts.sum()))
        odds = log_p[0] - log_p[1]
        for i in np.flatnonzero(folds == fold):
            scores[i] = odds[rows[i]].mean()
    return scores
