"""The one-run privacy audit: an empirical lower bound on ε from canaries."""

import math
import os
from dataclasses import dataclass

import keras
import numpy as np

from keras_vaultgemma._validation import check_number
from keras_vaultgemma.evaluation.canaries import read_canaries
from keras_vaultgemma.evaluation.one_run import lower_bound
from keras_vaultgemma.evaluation.parts import Parts
from keras_vaultgemma.evaluation.results import Result
from keras_vaultgemma.evaluation.roc import auc
from keras_vaultgemma.evaluation.signals import token_losses
from keras_vaultgemma.evaluation.texts import read_texts, special_ids, training_rows


@dataclass(frozen=True)
class Claim(Result):
    """The guarantee that an audit tests.

    Attributes:
        epsilon, delta: float.
        unit: string. What it protects, "" if that is not known.
        uncovered: string. What the guarantee does not cover, "" if it covers everything.
    """

    epsilon: float
    delta: float
    unit: str = ""
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

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    evaluation.insert_canaries(["No."], "canaries.json", count=10, length=8, model=model)
    found = evaluation.audit(model, "canaries.json", claim=(8.0, 1e-5))
    print(found.epsilon_lower_bound, found.claim.epsilon, found.is_consistent, found.as_dict())
    ```
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
    sealed, claimed, found = read_canaries(path), _claim(model, claim), []
    delta = delta if claimed is None else claimed.delta
    if sealed.is_seeded:
        found.append("The coins come from a seed: the audit proves nothing to those who do not")
    if claimed is not None and claimed.uncovered:
        found.append(f"The claim does not cover {claimed.uncovered}")
    parts = Parts(checkpoint)
    scores = _log_likelihoods(model, sealed, parts, "canaries", verbose)
    if reference is not None:
        scores -= _log_likelihoods(reference, sealed, parts, "canaries, reference", verbose)
    bound, guesses, correct = lower_bound(scores, sealed.is_in, delta, confidence)
    of_in, of_out = scores[sealed.is_in], scores[~sealed.is_in]
    return Audit(
        kind=sealed.kind,
        canaries=len(scores),
        included=len(of_in),
        guesses=guesses,
        correct=correct,
        epsilon_lower_bound=bound,
        delta=delta,
        confidence=confidence,
        auc=float(auc(of_in, of_out)) if len(of_in) and len(of_out) else math.nan,
        claim=claimed,
        is_consistent=None if claimed is None else bound <= claimed.epsilon,
        warnings=tuple(found),
    )


def _claim(model, claim):
    """Return a `Claim` from `(epsilon, delta)`, or else from the model's ledger; None without."""
    if claim is not None:
        epsilon, delta = claim
        check_number("claim[0]", epsilon, minimum=0)
        check_number("claim[1]", delta, minimum=0, below=1)
        return Claim(float(epsilon), float(delta))
    if not model.privacy.ledger.runs:
        return None
    spent = model.privacy.spent()
    return Claim(spent.epsilon, spent.delta, spent.unit, spent.uncovered)


def _log_likelihoods(model, sealed, parts, label, verbose):
    """Return the log-likelihood of each canary; of its new token alone if it has one."""
    texts = read_texts(sealed.canaries, model, "canaries")
    rows, _, truncated = training_rows(texts, model)
    if len(rows) < len(sealed.canaries) or truncated:
        raise ValueError(
            "Canaries must not be empty and must fit into the model's training rows. "
            f"Received: {len(sealed.canaries) - len(rows)} empty ones, and {truncated} that are "
            "longer"
        )
    losses = [nats for nats, _ in token_losses(model, rows, parts, label, verbose)]
    if sealed.kind == "new_token":
        end = len(special_ids(model)[1])
        losses = [nats[len(nats) - end - 1 :][:1] for nats in losses]
    return np.array([-nats.sum() for nats in losses])
