"""Charts and tables of the comparison page, from the dict of a comparison."""

from keras_vaultgemma.evaluation.charts import (
    Mark,
    Reference,
    Row,
    Scale,
    bar_chart,
    dot_chart,
    hundred,
)
from keras_vaultgemma.evaluation.wording import (
    ATTACKS,
    TITLES,
    bounds,
    fraction,
    percent,
)

HIGHEST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Upper ends of scales of rates, the smallest of which that fits is taken."""

STRATA = {
    "duplicates": "occurring {low:g} to {high:g} times",
    "entropy": "compressible to {low:.0%} to {high:.0%}",
}


def names(comparison: dict, section: str) -> list[str]:
    """Return the names of the models of a section, in the order of the page."""
    return [name for name in TITLES if comparison[section].get(name)]


def best_attack(membership: dict) -> dict:
    """Return the attack with the largest AUC."""
    return max(membership["attacks"], key=lambda attack: attack["auc"])


def best_rate(membership: dict, index: int = 0) -> dict:
    """Return the largest rate of true positives at a false positive rate, a `Rate` as a dict."""
    rates = (attack["true_positive_rates"][index]["rate"] for attack in membership["attacks"])
    return max(rates, key=lambda rate: rate["value"])


def limits_of(comparison: dict) -> dict | None:
    """Return the limits of attacks that the claim sets to the measured records, or None."""
    claim = comparison["claim"]
    return claim["limits"] if claim["data_match"] != "no" else None


def squares(comparison: dict) -> list[dict]:
    """Return squares of 100 dots: a coin, the claim's limit, and the measured models."""
    found = [_square(0.5, "coin", "a coin")]
    if limits := limits_of(comparison):
        found.append(_square(limits["auc"], "limit", "the most that the claim allows"))
    for name in ("private", "plain"):
        if name in comparison["membership"]:
            attack = best_attack(comparison["membership"][name])
            found.append(_square(attack["auc"], name, f"measured, {TITLES[name]}"))
    return found


def _square(share, style, label):
    count = round(100 * share)
    return {
        "svg": hundred(count, style, f"{count} of 100 dots are filled: {label}"),
        "figure": f"{count} of 100",
        "label": label,
    }


def utility(comparison: dict) -> dict:
    """Return the chart of bits per byte, its finding and a note."""
    found = {name: x["bits_per_byte"] for name, x in comparison["likelihood"].items()}
    rows = [
        Row(TITLES[name].capitalize(), f"{found[name]:.3f}", [Mark(found[name], name)])
        for name in names(comparison, "likelihood")
    ]
    highest = max(found.values())
    step = next(x for x in (0.25, 0.5, 1, 2, 5, 10, 100) if highest / x <= 8)
    ticks = [(i * step, f"{i * step:g}") for i in range(int(highest / step) + 2)]
    base, private, plain = (found.get(name) for name in ("base", "private", "plain"))
    finding = (
        f"Held-out text takes {private:.3f} bits per byte after private training, and {base:.3f} "
        "before"
    )
    if plain is not None and plain < base:
        kept = (base - private) / (base - plain)
        finding = (
            f"Private training brings {100 * max(kept, 0.0):.0f} % of what plain training brings"
        )
    size = comparison["likelihood"]["private"]
    return {
        "finding": f"{finding}.",
        "models": _heads(names(comparison, "likelihood")),
        "svg": bar_chart(rows, Scale(0, ticks[-1][0], ticks), finding),
        "note": "Bits needed per byte of held-out text; fewer is better. Measured on "
        f"{size['bytes']:,} bytes of {comparison['data']['held_out']['records']:,} "
        "held-out records.",
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
        "models": _heads(models),
        "plots": plots,
        "sampled": _sampled(results, models),
        "table": _excesses(results, models),
        "strata": _strata(results, models),
        "notes": list(dict.fromkeys(w for name in models for w in results[name]["warnings"])),
    }


def _heads(models):
    return [{"style": name, "title": TITLES[name].capitalize()} for name in models]


def _rates_plot(results, models, measure, words):
    rows, highest = [], 0.0
    for name in models:
        members, controls = results[name]["members"][measure], results[name]["controls"]
        marks = [_rate_mark(members, name)]
        if controls is not None:
            marks.append(_rate_mark(controls[measure], f"{name} control"))
        highest = max(highest, *(mark.upper for mark in marks))
        rows.append(Row(TITLES[name].capitalize(), fraction(members), marks))
    private = results["private"]["members"][measure]
    finding = (
        f"After private training, {fraction(private)} training records are repeated {words}: "
        f"{bounds(private)}."
    )
    if "plain" in models:
        finding += f" After plain training, {fraction(results['plain']['members'][measure])}."
    return {"finding": finding, "svg": dot_chart(rows, _rates(highest), finding), "has_key": True}


def _rate_mark(rate, style):
    return Mark(rate["value"], style, rate["low"], rate["high"])


def _rates(highest):
    """Return the `Scale` from 0 to a round number above a rate."""
    end = next((x for x in HIGHEST if highest <= x), 1.0)
    return Scale(0, end, [(end * i / 4, f"{100 * end * i / 4:g} %") for i in range(5)])


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
        "models": _heads(models),
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
        references.append(Reference(limits["auc"], f"claimed: at most {100 * limits['auc']:.0f}"))
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
        Row(TITLES[name].capitalize(), fraction(rate), [_rate_mark(rate, name)])
        for name, rate in rates.items()
    ]
    references = [Reference(0.01, "by chance: 1 %", "coin")]
    if limits:
        limit = limits["true_positive_rates"]["0.01"]
        references.append(Reference(limit, f"claimed: at most {percent(limit)}"))
    finding = (
        "An attacker who wrongly accuses 1 of 100 unseen records finds "
        f"{fraction(rates['private'])} training records after private training"
    )
    if "plain" in rates:
        finding += f", and {fraction(rates['plain'])} after plain training"
    return {
        "finding": f"{finding}.",
        "svg": dot_chart(rows, _rates(1.0), finding, references),
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
        finding = f"The audit {agrees} the claim of at most {claim['epsilon']:g}"
    guesses = f"{private['correct']:,} of {private['guesses']:,} guesses were right"
    if not private["guesses"]:
        guesses = "no number of guesses was right more often than chance allows"
    return {
        "finding": f"{finding}.",
        "svg": bar_chart(rows, Scale(0, ticks[-1][0], ticks), finding, references),
        "note": f"{private['canaries']:,} canaries ({private['kind'].replace('_', ' ')} text), "
        f"{private['included']:,} of them among the data; {guesses}. "
        f"{100 * private['confidence']:g} % confidence. "
        "One audit with few canaries finds gross errors only; a small bound is no proof.",
    }


def tasks(comparison: dict) -> list[dict]:
    """Return rows of the tasks that models were evaluated on; none if there are none."""
    results = {name: x["tasks"] for name, x in comparison["tasks"].items()}
    rows = dict.fromkeys(
        (task, metric)
        for found in results.values()
        for task, x in found.items()
        for metric in x["metrics"]
    )

    def cell(name, task, metric):
        x = results.get(name, {}).get(task, {"metrics": {}})["metrics"].get(metric)
        if x is None or x["value"] is None:
            return "–"
        error = x["standard_error"]
        return f"{100 * x['value']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")

    return [
        {
            "label": f"{task}, {metric}",
            "values": [cell(name, task, metric) for name in names(comparison, "likelihood")],
        }
        for task, metric in rows
    ]
