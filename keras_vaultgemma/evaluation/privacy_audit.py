"""The one-run privacy audit: an empirical lower bound on ε from canaries."""

import math
import os
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_vaultgemma._validation import check_number
from keras_vaultgemma.evaluation.canaries import read_canaries
from keras_vaultgemma.evaluation.intervals import import_stats
from keras_vaultgemma.evaluation.membership import auc
from keras_vaultgemma.evaluation.parts import Parts
from keras_vaultgemma.evaluation.results import Result
from keras_vaultgemma.evaluation.signals import record_signals
from keras_vaultgemma.evaluation.texts import read_texts

GUESSES = (0.05, 0.125, 0.25, 0.5, 1.0)
"""Fractions of the canaries that are guessed, of which the best one counts."""


@dataclass(frozen=True)
class Claim(Result):
    """The guarantee that an audit tests.

    Attributes:
        epsilon, delta: float.
        uncovered: string. What the guarantee does not cover, "" if it covers everything.
    """

    epsilon: float
    delta: float
    uncovered: str = ""


@dataclass(frozen=True)
class Audit(Result):
    """Result of `audit`.

    Attributes:
        kind: string. Kind of the canaries.
        canaries: int. Number of canaries.
        included: int. Number of canaries that were in the training data.
        guesses, correct: int. Guesses that the bound comes from, and how many were right.
        epsilon_lower_bound: float. The training's ε is at least this at `delta`, unless the guesses
            were right by a chance of `1 - confidence`.
        delta: float.
        confidence: float.
        auc: float. Area under the ROC curve of the canaries' scores.
        claim: `Claim`, or None without a ledger.
        is_consistent: bool or None. False if the lower bound is above the claim.
        warnings: tuple of strings.
    """

    kind: str
    canaries: int
    included: int
    guesses: int
    correct: int
    epsilon_lower_bound: float
    delta: float
    confidence: float
    auc: float
    claim: Claim | None
    is_consistent: bool | None
    warnings: tuple[str, ...]

    def __str__(self):
        claim = "no claim" if self.claim is None else f"claimed: ε ≤ {self.claim.epsilon:g}"
        return (
            f"{self.correct} of {self.guesses} guesses right: ε ≥ {self.epsilon_lower_bound:.3g} "
            f"({100 * self.confidence:g} % confidence, δ = {self.delta:g}); {claim}"
        )


def audit(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    reference: keras.Model | None = None,
    claim: tuple[float, float] | None = None,
    delta: float = 1e-5,
    confidence: float = 0.95,
    checkpoint: str | os.PathLike | None = None,
    verbose: bool = True,
) -> Audit:
    """Compute a lower bound on the ε of a training from the canaries in its data.

    Args:
        model: `VaultGemmaCausalLM` after training.
        path: path of the file that `insert_canaries` wrote.
        reference: `VaultGemmaCausalLM` before training, which makes guesses better. Defaults to
            None.
        claim: tuple `(epsilon, delta)`, or None for the guarantee in the model's ledger. Defaults
            to None.
        delta: float in [0, 1). δ of the bound if there is no claim. Defaults to 1e-5.
        confidence: float. Defaults to 0.95.
        checkpoint: path of a folder, as for `measure_memorization`. Defaults to None.
        verbose: bool. True for progress bars. Defaults to True.

    Returns:
        `Audit`.

    Raises:
        ValueError: If the file was changed, or an argument is out of its range.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    tokenizer = model.preprocessor.tokenizer
    evaluation.insert_canaries(["No."], "canaries.json", count=50, length=8, tokenizer=tokenizer)
    print(evaluation.audit(model, "canaries.json"))
    ```

    References:
        - [Steinke et al., 2023](https://arxiv.org/abs/2305.08846)
    """
    check_number("confidence", confidence, minimum=0.5, below=1)
    check_number("delta", delta, minimum=0, below=1)
    sealed = read_canaries(path)
    claim = _claim(model, claim)
    delta = delta if claim is None else claim.delta
    texts = read_texts(sealed["canaries"], model, "canaries")
    parts = Parts(checkpoint)
    scores = _log_likelihoods(model, texts, parts, "canaries", verbose)
    if reference is not None:
        scores = scores - _log_likelihoods(reference, texts, parts, "reference", verbose)
    is_in = np.array(sealed["is_in"])
    bound, guesses, correct = lower_bound(scores, is_in, delta, confidence)
    return Audit(
        sealed["kind"],
        len(is_in),
        int(is_in.sum()),
        guesses,
        correct,
        bound,
        delta,
        confidence,
        float(auc(scores[is_in], scores[~is_in])) if 0 < is_in.sum() < len(is_in) else math.nan,
        claim,
        None if claim is None else bound <= claim.epsilon,
        (),
    )


def _claim(model, claim: Any):
    if claim is not None:
        return claim if isinstance(claim, Claim) else Claim(*claim)
    try:
        spent = model.privacy.spent()
    except ValueError:  # no private run
        return None
    return Claim(spent.epsilon, spent.delta, spent.uncovered)


def _log_likelihoods(model, texts, parts, label, verbose):
    signals = record_signals(model, texts.rows, texts.contents, 1.0, parts, label, verbose)
    return signals["loss"]


def lower_bound(scores, is_in, delta, confidence=0.95):
    """Return the lower bound on ε of the best of several numbers of guesses, and that number.

    Args:
        scores: float array `[M]`. Higher scores speak for membership.
        is_in: bool array `[M]`. The coin flips.
        delta: float.
        confidence: float. Defaults to 0.95.

    Returns:
        Tuple `(epsilon, guesses, correct)`.
    """
    order, count = np.argsort(scores, kind="stable"), len(scores)
    numbers = sorted({max(1, int(count * share / 2)) for share in GUESSES})
    best = (0.0, 0, 0)
    for each in numbers:
        correct = int(is_in[order[-each:]].sum() + (~is_in[order[:each]]).sum())
        significance = (1 - confidence) / len(numbers)
        bound = epsilon_lower_bound(count, 2 * each, correct, delta, significance)
        best = max(best, (bound, 2 * each, correct), key=lambda x: x[0])
    return best


def p_value(canaries, guesses, correct, epsilon, delta):
    """Return the largest probability of this many right guesses under (ε, δ)-DP."""
    binom = import_stats().binom
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, q))
    if not delta or not correct:
        return beta
    fewer = np.arange(1, correct + 1)
    alpha = np.max((binom.sf(correct - fewer - 1, guesses, q) - beta) / fewer, initial=0)
    return float(min(1.0, beta + 2 * canaries * delta * alpha))


def epsilon_lower_bound(canaries, guesses, correct, delta, significance):
    """Return the largest ε whose p-value is at most `significance`, or 0."""
    low, high = 0.0, 1.0
    if p_value(canaries, guesses, correct, low, delta) > significance:
        return 0.0
    while p_value(canaries, guesses, correct, high, delta) <= significance:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        is_rejected = p_value(canaries, guesses, correct, middle, delta) <= significance
        low, high = (middle, high) if is_rejected else (low, middle)
    return low
