"""Receiver operating characteristic of scores that tell members from controls."""

import numpy as np


def auc(members, controls):
    """Return the area under the curve of two arrays of scores.

    It is the probability that a random member scores higher than a random control. Equal scores
    count one half.
    """
    controls = np.sort(controls)
    below = np.searchsorted(controls, members, "left") + np.searchsorted(controls, members, "right")
    return below.mean() / (2 * len(controls))


def true_positives(members, controls, false_positive_rate):
    """Return the number of members that score above all but that fraction of the controls."""
    allowed = int(false_positive_rate * len(controls) + 1e-9)
    return int(np.sum(members > np.sort(controls)[len(controls) - 1 - allowed]))
