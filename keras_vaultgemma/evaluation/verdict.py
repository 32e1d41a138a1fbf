"""The verdict of a comparison: its status, what contradicts the claim, and the main findings."""

from keras_vaultgemma.evaluation import figures, wording

STAMPS = {
    "claim": "Claim, not contradicted by measurement",
    "conditional": "Claim on a condition",
    "none": "No claim",
    "contradicted": "Claim in doubt",
}


def verdict(comparison: dict) -> dict:
    """Return what a comparison amounts to: status, stamp, alarms and sentences.

    Args:
        comparison: dict of a comparison without its verdict.
    """
    alarms, claim = _alarms(comparison), comparison["claim"]
    status = "contradicted" if alarms else claim["status"]
    is_tested = any(comparison[name] for name in ("membership", "memorization", "audit"))
    stamp = STAMPS[status]
    if status == "claim" and not is_tested:
        stamp = "Claim, not tested by measurement"
    elif status == "claim" and claim["data_match"] == "no":
        stamp = "Claim about other records than were measured"
    elif status == "claim" and _has_few_records(comparison):
        stamp = "Claim, tested on too few records"
    return {
        "status": status,
        "stamp": stamp,
        "alarms": alarms,
        "sentences": _sentences(comparison),
    }


def _alarms(comparison):
    """Return sentences about measurements that contradict the claim."""
    alarms, limits = [], figures.limits_of(comparison)
    audited = comparison["audit"].get("private")
    if audited and audited["is_consistent"] is False:
        alarms.append(
            f"The audit shows that ε is at least {audited['epsilon_lower_bound']:.2g}, and the "
            f"claim is at most {comparison['claim']['epsilon']:g} ({100 * audited['confidence']:g} "
            "% confidence). Do not rely on the claim until the reason is found."
        )
    measured = comparison["membership"].get("private")
    if limits and measured:
        attack = figures.best_attack(measured)
        # Records of two kinds can be told apart without the model.
        if attack["auc_low"] > limits["auc"] and not measured["shift"]["is_found"]:
            alarms.append(
                f"An attack tells {100 * attack['auc']:.0f} of 100 pairs apart, and the claim "
                f"allows {wording.at_most(limits['auc'])}. Do not rely on the claim until the "
                "reason is found."
            )
    return alarms


def _sentences(comparison):
    found = []
    memorized = comparison["memorization"].get("private")
    if memorized:
        rate = memorized["members"]["exact"]
        sentence = (
            f"Repetition: of its training records the model repeats {wording.fraction(rate)} word "
            f"for word ({wording.bounds(rate)})"
        )
        if "plain" in comparison["memorization"]:
            plain = comparison["memorization"]["plain"]["members"]["exact"]
            sentence += f"; the plain model {wording.fraction(plain)}"
        found.append(f"{sentence}.")
    recognised = comparison["membership"].get("private")
    if recognised:
        attack = figures.best_attack(recognised)
        sentence = (
            f"Recognition: the best attack tells {100 * attack['auc']:.0f} of 100 pairs of a "
            f"training record and an unseen one apart ({100 * attack['auc_low']:.0f} to "
            f"{100 * attack['auc_high']:.0f})"
        )
        if "plain" in comparison["membership"]:
            plain = figures.best_attack(comparison["membership"]["plain"])
            sentence += f"; of the plain model {100 * plain['auc']:.0f}"
        found.append(f"{sentence}.")
        if recognised["shift"]["is_found"]:
            found.append(
                "Training and unseen records differ without any model, in words, lengths or "
                "difficulty. Recognition measures that difference as well."
            )
    audited = comparison["audit"].get("private")
    if audited:
        found.append(
            f"Audit: ε is at least {audited['epsilon_lower_bound']:.2g} "
            f"({100 * audited['confidence']:g} % confidence)."
        )
    found.append(f"Usefulness: {figures.utility(comparison)['finding']}")
    if _has_few_records(comparison):
        found.append(
            "Fewer than 30 records were tested. Intervals are given, and nothing is claimed from "
            "these measurements."
        )
    return found


def _has_few_records(comparison):
    results = (comparison[name].get("private") for name in ("memorization", "membership"))
    return any(not result["is_claim"] for result in results if result)


def summary(comparison: dict) -> list[str]:
    """Return the verdict as lines of text."""
    claim, found = comparison["claim"], comparison["verdict"]
    lines = [f"{found['stamp']}: {claim['reason'] or budget(claim)}"]
    return [*lines, *found["alarms"], *found["sentences"]]


def budget(claim: dict) -> str:
    """Return ε, δ and the unit of a claim in words."""
    return f"ε = {claim['epsilon']:g} at δ = {claim['delta']:.3g} for {claim['unit']}"
