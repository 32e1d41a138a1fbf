"""Charts and tables of what models reveal: repetition, membership, and the audit."""

import numpy as np

from keras_vaultgemma.evaluation.charts import Mark, Reference, Row, Scale, bar_chart, dot_chart
from keras_vaultgemma.evaluation.figures import (
    best_attack,
    best_rate,
    heads,
    limits_of,
    names,
    rate_mark,
    rates_scale,
)
from keras_vaultgemma.evaluation.one_run import lower_bound
from keras_vaultgemma.evaluation.wording import ATTACKS, TITLES, at_most, bounds, fraction, percent
from keras_vaultgemma.privacy.accounting import round_up

STRATA = {
    "duplicates": "occurring {low:g} to {high:g} times",
    "entropy": "compressible to {low:.0%} to {high:.0%}",
}


def memorization(comparison: dict) -> dict | None:
    """Return charts and tables of repetition, or None if it was not measured."""
    results = comparison["memorization"]
    models = names(comparison, "memorization")
    if "private" not in models:
        return None
    one = results["private"]
    plots = [
        _rates_plot(results, models, "exact", "word for word"),
        _rates_plot(results, models, "approximate", "all but word for word (at most 10 % differ)"),
    ]
    return {
        "prefix_length": one["prefix_length"],
        "suffix_length": one["suffix_length"],
        "models": heads(models),
        "plots": plots,
        "sampled": _sampled(results, models),
        "table": _excesses(results, models),
        "strata": _strata(results, models),
        "notes": list(dict.fromkeys(w for name in models for w in results[name]["warnings"])),
    }


def _rates_plot(results, models, measure, words):
    rows, highest = [], 0.0
    for name in models:
        members, controls = results[name]["members"][measure], results[name]["controls"]
        marks = [rate_mark(members, name)]
        if controls is not None:
            marks.append(rate_mark(controls[measure], f"{name} control"))
        highest = max(highest, *(mark.upper for mark in marks))
        rows.append(Row(TITLES[name].capitalize(), fraction(members), marks))
    private = results["private"]["members"][measure]
    finding = (
        f"After private training, {fraction(private)} training records are repeated {words}: "
        f"{bounds(private)}."
    )
    if "plain" in models:
        finding += f" After plain training, {fraction(results['plain']['members'][measure])}."
    return {
        "finding": finding,
        "svg": dot_chart(rows, rates_scale(highest), finding),
        "has_key": True,
    }


def _sampled(results, models):
    """Return rows of probabilistic extraction."""
    return [
        {
            "label": f"{x['attempts']:,} attempt{'s' if x['attempts'] > 1 else ''}, found with "
            f"probability {x['probability']:g} or more",
            "values": [
                fraction(results[name]["members"]["probabilistic"][i]["rate"]) for name in models
            ],
        }
        for i, x in enumerate(results[models[0]]["members"]["probabilistic"])
    ]


def _excesses(results, models):
    """Return rows of excess rates in percentage points."""
    rows = {}
    for name in models:
        for x in results[name]["excess"]:
            text = f"{100 * x['value']:+.1f} ({100 * x['low']:+.1f} to {100 * x['high']:+.1f})"
            text = text.replace("-", "−")
            rows.setdefault((x["measure"], x["over"]), {})[name] = text
    over = {"baseline": "than before training", "controls": "than of unseen records"}
    kinds = {"exact": "Word for word", "approximate": "All but word for word"}
    return [
        {
            "label": f"{kinds[measure]}: more {over[what]}",
            "values": [values.get(name, "–") for name in models],
        }
        for (measure, what), values in rows.items()
    ]


def _strata(results, models):
    """Return rows of the parts of the records, if there are several by one property."""
    rows = {}
    for name in models:
        for x in results[name]["strata"]:
            key = (x["by"], x["low"], x["high"])
            rows.setdefault(key, {})[name] = fraction(x["approximate"])
    several = {by for by, *_ in rows if sum(key[0] == by for key in rows) > 1}
    return [
        {
            "label": STRATA.get(by, by).format(low=low, high=high).capitalize(),
            "values": [values.get(name, "–") for name in models],
        }
        for (by, low, high), values in rows.items()
        if by in several
    ]


def membership(comparison: dict) -> dict | None:
    """Return charts and tables of membership inference, or None if it was not measured."""
    results, models = comparison["membership"], names(comparison, "membership")
    if "private" not in models:
        return None
    limits = limits_of(comparison)
    one = results["private"]
    shift = one["shift"]
    notes = [
        "Training and unseen records by themselves, without the models: "
        f"{100 * shift['words']:.0f} of 100 pairs are told apart by their words, and "
        f"{100 * shift['length']:.0f} by their lengths.",
        *dict.fromkeys(w for name in models for w in results[name]["warnings"]),
    ]
    return {
        "models": heads(models),
        "plots": [_auc_plot(results, models, limits), _caught_plot(results, models, limits)],
        "table": _attacks(results, models),
        "notes": notes,
    }


def _auc_plot(results, models, limits):
    best = {name: best_attack(results[name]) for name in models}
    rows = [
        Row(
            TITLES[name].capitalize(),
            f"{100 * x['auc']:.0f} ({100 * x['auc_low']:.0f} to {100 * x['auc_high']:.0f})",
            [Mark(x["auc"], name, x["auc_low"], x["auc_high"])],
        )
        for name, x in best.items()
    ]
    references = [Reference(0.5, "a coin: 50", "coin")]
    if limits:
        references.append(Reference(limits["auc"], f"claimed: at most {at_most(limits['auc'])}"))
    low = 0.4 if min(x["auc_low"] for x in best.values()) >= 0.4 else 0.0
    ticks = [(x / 10, f"{10 * x}") for x in range(int(10 * low), 11, 1 if low else 2)]
    finding = (
        f"After private training, the best attack tells {100 * best['private']['auc']:.0f} of 100 "
        "pairs apart"
    )
    if "plain" in best:
        finding += f"; after plain training, {100 * best['plain']['auc']:.0f}"
    return {
        "finding": f"{finding}.",
        "svg": dot_chart(rows, Scale(low, 1.0, ticks), finding, references),
        "note": "The best of all attacks for each model, with its 95 % interval.",
    }


def _caught_plot(results, models, limits):
    rates = {name: best_rate(results[name]) for name in models}
    rows = [
        Row(TITLES[name].capitalize(), fraction(rate), [rate_mark(rate, name)])
        for name, rate in rates.items()
    ]
    references = [Reference(0.01, "by chance: 1 %", "coin")]
    if limits:
        limit = round_up(limits["true_positive_rates"]["0.01"], 3)
        references.append(Reference(limit, f"claimed: at most {percent(limit)}"))
    finding = (
        "An attacker who wrongly accuses 1 of 100 unseen records finds "
        f"{fraction(rates['private'])} training records after private training"
    )
    if "plain" in rates:
        finding += f", and {fraction(rates['plain'])} after plain training"
    return {
        "finding": f"{finding}.",
        "svg": dot_chart(rows, rates_scale(1.0), finding, references),
        "note": "The few records about which an attacker can be certain matter most. The best of "
        "all attacks for each model.",
    }


def _attacks(results, models):
    by_name = {name: {x["name"]: x for x in results[name]["attacks"]} for name in models}
    kinds = dict.fromkeys(kind for attacks in by_name.values() for kind in attacks)

    def cell(x):
        if x is None:
            return "–"
        return f"{100 * x['auc']:.1f} ({100 * x['auc_low']:.1f} to {100 * x['auc_high']:.1f})"

    return [
        {
            "label": ATTACKS.get(kind, kind),
            "values": [cell(by_name[name].get(kind)) for name in models],
        }
        for kind in kinds
    ]


def audit(comparison: dict) -> dict | None:
    """Return the chart of the audit, or None if there was none."""
    results = comparison["audit"]
    if "private" not in results:
        return None
    claim, private = comparison["claim"], results["private"]
    has_claim = claim["limits"] is not None
    found = {name: results[name]["epsilon_lower_bound"] for name in names(comparison, "audit")}
    rows = [
        Row(TITLES[name].capitalize(), f"ε is at least {bound:.2g}", [Mark(bound, name)])
        for name, bound in found.items()
    ]
    highest = max(*found.values(), claim["epsilon"] if has_claim else 0.0, 0.5) * 1.1
    step = next(x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if highest / x <= 8)
    ticks = [(i * step, f"{i * step:g}") for i in range(int(highest / step) + 2)]
    references = [Reference(claim["epsilon"], f"claimed: at most {claim['epsilon']:g}")] * has_claim
    finding = f"The audit shows that ε is at least {found['private']:.2g}"
    if has_claim:
        agrees = "does not contradict" if private["is_consistent"] else "CONTRADICTS"
        finding = (
            f"The audit {agrees} the claim: it shows that ε is at least {found['private']:.2g}, "
            f"and the claim is at most {claim['epsilon']:g}"
        )
    guesses = f"{private['correct']:,} of {private['guesses']:,} guesses were right"
    if not private["guesses"]:
        guesses = "no number of guesses was right more often than chance allows"
    return {
        "finding": f"{finding}.",
        "svg": bar_chart(rows, Scale(0, ticks[-1][0], ticks), finding, references),
        "note": f"{private['canaries']:,} canaries ({private['kind'].replace('_', ' ')} text), "
        f"{private['included']:,} of them among the data; {guesses}. "
        f"{100 * private['confidence']:g} % confidence. "
        f"With so many canaries it could have shown at most ε = {_largest_bound(private):.2g}; a "
        "small bound is no proof.",
    }


def _largest_bound(found):
    """Return the bound of an audit all of whose guesses are right."""
    is_in = np.arange(found["canaries"]) < found["included"]
    return lower_bound(is_in.astype("float64"), is_in, found["delta"], found["confidence"])[0]
