"""Arithmetic of the privacy audit with one training run (Steinke, Nasr and Jagielski, 2023).

M canaries are each in the training data or not, by a fair coin. An auditor guesses some of the
coins from the trained model. Under (ε, δ)-DP each guess is right with probability e^ε / (1 + e^ε)
at most, whatever the other coins, up to δ. So the number of right guesses bounds ε from below
(https://arxiv.org/abs/2305.08846).
"""

import math

import numpy as np

from keras_vaultgemma.evaluation.intervals import import_stats

GUESSES = (0.05, 0.125, 0.25, 0.5, 1.0)
"""Fractions of the canaries that are guessed. The best one counts, with Bonferroni's correction."""

LARGEST = 100.0
"""Largest ε that is looked for."""


def lower_bound(scores, is_in, delta, confidence=0.95):
    """Compute a lower bound on ε from scores of canaries.

    The highest scores are guessed to be in and as many of the lowest ones to be out, for several
    numbers of guesses that are fixed in advance.

    Args:
        scores: float array `[M]`. Higher ones speak for a canary that was in the data.
        is_in: bool array `[M]`. The coins.
        delta: float. δ of the guarantee.
        confidence: float. Defaults to 0.95.

    Returns:
        Tuple `(epsilon, guesses, correct)`: the bound and the numbers it comes from; of the largest
        number of guesses if the bound is 0.
    """
    order, count = np.argsort(scores, kind="stable"), len(scores)
    numbers = sorted({max(1, int(count * share / 2)) for share in GUESSES}, reverse=True)
    best = None
    for each in numbers:
        correct = int(is_in[order[-each:]].sum() + (~is_in[order[:each]]).sum())
        significance = (1 - confidence) / len(numbers)
        bound = epsilon_lower_bound(count, 2 * each, correct, delta, significance)
        if best is None or bound > best[0]:
            best = bound, 2 * each, correct
    return best


def p_value(canaries, guesses, correct, epsilon, delta):
    """Return the largest probability of `correct` or more right guesses under (ε, δ)-DP.

    Args:
        canaries: int. M.
        guesses: int. Number of coins that are guessed.
        correct: int. Number of right guesses.
        epsilon, delta: float.
    """
    binom = import_stats().binom
    q = 1 / (1 + math.exp(-epsilon))
    at_least = float(binom.sf(correct - 1, guesses, q))
    if not delta or not correct:
        return at_least
    fewer = np.arange(1, correct + 1)
    per_guess = (binom.sf(correct - fewer - 1, guesses, q) - at_least) / fewer
    return float(min(1.0, at_least + 2 * canaries * delta * np.max(per_guess, initial=0)))


def epsilon_lower_bound(canaries, guesses, correct, delta, significance):
    """Return the largest ε whose p-value is at most `significance`; 0 if there is none."""

    def is_rejected(epsilon):
        return p_value(canaries, guesses, correct, epsilon, delta) <= significance

    low, high = 0.0, LARGEST
    if not is_rejected(low):
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if is_rejected(middle) else (low, middle)
    return low
