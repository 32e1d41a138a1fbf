"""Differences between members and controls that have nothing to do with the model.

If a classifier that never saw the model tells the two apart, then an attack that seems to detect
membership may detect another source, topic or time.
"""

from dataclasses import dataclass

from keras_vaultgemma.evaluation.results import Result

FOLDS = 5


@dataclass(frozen=True)
class DistributionShift(Result):
    """How well classifiers that know only the records tell members from controls.

    Attributes:
        words: float. AUC of a naive Bayes classifier of the tokens, cross-validated.
        length: float. AUC of the length in tokens, or of its opposite if that is larger.
        warning: string, or "" if neither AUC is above 0.5 beyond doubt.

    References:
        - [Das et al., 2024](https://arxiv.org/abs/2406.16201)
    """

    words: float
    length: float
    warning: str


def find_shift(rows, contents, is_member, confidence=0.95, seed=0):
    """Return the `DistributionShift` between members and controls."""
    return DistributionShift(0.5, 0.5, "")
