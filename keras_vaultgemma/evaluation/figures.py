"""Charts and tables of the comparison page, from the dict of a comparison."""

from keras_vaultgemma.evaluation.charts import (
    Mark,
    Row,
    Scale,
    bar_chart,
    hundred,
)
from keras_vaultgemma.evaluation.wording import TITLES, at_most

HIGHEST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Upper ends of scales of rates, the smallest of which that fits is taken."""


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
    count = at_most(share) if style == "limit" else round(100 * share)
    return {
        "svg": hundred(count, style, f"{count} of 100 dots are filled: {label}"),
        "figure": f"{count} of 100",
        "label": label,
    }


def utility(comparison: dict) -> dict:
    """Return the chart of bits per byte, its finding and a note."""
    found = {name: x["bits_per_byte"] for name, x in comparison["likelihood"].items()}
    models, diverged = names(comparison, "likelihood"), [n for n, x in found.items() if x is None]
    rows = [
        Row(TITLES[name].capitalize(), "not finite", [])
        if found[name] is None
        else Row(TITLES[name].capitalize(), f"{found[name]:.3f}", [Mark(found[name], name)])
        for name in models
    ]
    highest = max((x for x in found.values() if x is not None), default=1.0)
    step = next((x for x in (0.25, 0.5, 1, 2, 5, 10) if highest / x <= 8), highest / 4)
    ticks = [(i * step, f"{i * step:g}") for i in range(int(highest / step) + 2)]
    base, private, plain = found["base"], found["private"], found.get("plain")
    if diverged:
        finding = f"The model diverged: {', '.join(TITLES[name] for name in diverged)}"
    elif plain is not None and plain < base:
        kept = max(0.0, (base - private) / (base - plain))
        finding = f"Private training brings {100 * kept:.0f} % of what plain training brings"
    else:
        finding = (
            f"Held-out text takes {private:.3f} bits per byte after private training, and "
            f"{base:.3f} before"
        )
    size = comparison["likelihood"]["private"]
    return {
        "finding": f"{finding}.",
        "models": heads(models),
        "svg": bar_chart(rows, Scale(0, ticks[-1][0], ticks), finding),
        "note": "Bits needed per byte of held-out text; fewer is better. Measured on "
        f"{size['bytes']:,} bytes of {comparison['data']['held_out']['records']:,} "
        "held-out records.",
    }


def heads(models):
    """Return style and title of models, for the head of a table."""
    return [{"style": name, "title": TITLES[name].capitalize()} for name in models]


def rate_mark(rate, style):
    """Return the `Mark` of a `Rate` as a dict."""
    return Mark(rate["value"], style, rate["low"], rate["high"])


def rates_scale(highest):
    """Return the `Scale` from 0 to a round number above a rate."""
    end = next((x for x in HIGHEST if highest <= x), 1.0)
    return Scale(0, end, [(end * i / 4, f"{100 * end * i / 4:g} %") for i in range(5)])


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
