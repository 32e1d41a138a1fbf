"""The claim that a privacy ledger supports, and what it leaves open."""

import dataclasses
from typing import Any

from keras_vaultgemma.evaluation.attack_limits import AttackLimits, attack_limits
from keras_vaultgemma.privacy import fingerprint
from keras_vaultgemma.privacy.ledger import Ledger

CLAIM, CONDITIONAL, NONE = "claim", "conditional", "none"


@dataclasses.dataclass(frozen=True)
class LedgerClaim:
    """The differential privacy guarantee of a model, as its ledger states it.

    Attributes:
        status: str. "claim"; "conditional" if something was trained or loaded that the guarantee
            does not cover; "none" if there is no guarantee.
        reason: str. Why there is no claim, or its condition; "" for a claim without condition.
        epsilon: float or None. ε, rounded up.
        delta: float or None. δ.
        unit: str. What is protected, such as "one row of at most 128 tokens".
        neighbouring: str. Relation of the data sets that cannot be distinguished.
        mechanism: str. Description of the mechanism.
        records: int. N, the number of records (rows or users) that were trained on.
        steps: int. Number of steps on these data.
        runs: tuple of dicts. The ledger's entries of runs on these data.
        statements: tuple of dicts. Guarantees of others, such as of the pre-training.
        data_match: str. "yes" if the ledger is about the records that were measured, "no", or
            "unknown" if their fingerprints cannot be compared.
        limits: `AttackLimits` or None.

    Example:

    ```python
    from keras_vaultgemma.evaluation import LedgerClaim

    claim = LedgerClaim("none", reason="The model has no privacy ledger")
    print(claim.as_dict()["epsilon"])  # None
    ```
    """

    status: str
    reason: str = ""
    epsilon: float | None = None
    delta: float | None = None
    unit: str = ""
    neighbouring: str = ""
    mechanism: str = ""
    records: int = 0
    steps: int = 0
    runs: tuple[dict, ...] = ()
    statements: tuple[dict, ...] = ()
    data_match: str = "unknown"
    limits: AttackLimits | None = None

    def as_dict(self) -> dict:
        """Return a dict that is serialisable as JSON."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        limits = None if self.limits is None else self.limits.as_dict()
        return {
            **content,
            "runs": list(self.runs),
            "statements": list(self.statements),
            "limits": limits,
        }


def find_claim(ledger: Ledger, dataset: str | None = None) -> LedgerClaim:
    """Return the claim of a ledger about the data of one of its runs.

    Args:
        ledger: `Ledger` of the model, such as `model.privacy.ledger`.
        dataset: str. Fingerprint of the records that the claim shall be about. Defaults to the data
            of the last run, which are also taken if no run is on `dataset`.

    Raises:
        ImportError: If batches were truncated and SciPy is not installed.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    claim = evaluation.find_claim(model.privacy.ledger)
    print(claim.status, claim.reason)  # none: the ledger has no private run
    ```
    """
    stated = tuple(statement for statement in ledger.statements if "epsilon" in statement)
    done = [(run, count) for run, count in ledger.runs if count]
    if not done:
        missing = "The model has no privacy ledger"
        if ledger != Ledger():
            missing = "The model's privacy ledger has no private run"
        return LedgerClaim(
            NONE, f"{missing}, so nothing is known about its training", statements=stated
        )
    names = [run.dataset for run, _ in done]
    match, chosen = "unknown", names[-1]
    if dataset in names:
        match, chosen = "yes", dataset
    elif dataset is not None and all(fingerprint.have_same_key(name, dataset) for name in names):
        match = "no"
    spent = ledger.spent_on(chosen)
    runs = [pair for pair in done if fingerprint.may_be_equal(pair[0].dataset, chosen)]
    facts: dict[str, Any] = dict(
        epsilon=spent.epsilon,
        delta=spent.delta,
        unit=spent.unit,
        neighbouring=spent.neighbouring,
        mechanism=spent.mechanism,
        records=max(run.rows for run, _ in runs),
        steps=spent.steps,
        runs=tuple(_describe(run, count) for run, count in runs),
        statements=stated,
        data_match=match,
    )
    if not spent.is_private:
        reason = (
            "The random numbers of a run were seeded for tests, so that anyone can compute them"
        )
        return LedgerClaim(NONE, reason, **facts)
    limits = attack_limits(ledger.on(chosen))
    if spent.uncovered:
        reason = f"It does not cover {spent.uncovered}"
        return LedgerClaim(CONDITIONAL, reason, limits=limits, **facts)
    return LedgerClaim(CLAIM, limits=limits, **facts)


def _describe(run, count):
    names = (
        "name",
        "rows",
        "sampling_probability",
        "max_batch_size",
        "noise_multiplier",
        "clip_norm",
        "delta",
        "planned_steps",
        "unit",
        "dataset",
        "mechanism",
        "neighbouring",
        "package_version",
    )
    return {**{name: getattr(run, name) for name in names}, "steps": count}
