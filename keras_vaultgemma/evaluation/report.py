"""The comparison page: one self-contained HTML file, made from the dict of a comparison alone."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

from keras_vaultgemma._files import new_folder
from keras_vaultgemma.evaluation import figures, leakage_figures, wording
from keras_vaultgemma.evaluation.verdict import budget
from keras_vaultgemma.evaluation.wording import UNPROTECTED as UNPROTECTED
from keras_vaultgemma.privacy.accounting import round_up

FORMAT = 1
"""Version of the format of a comparison, whose schema is schemas/comparison.json."""

MASK = "▒▒▒▒▒ ▒▒▒ ▒▒▒▒▒▒▒ ▒▒ ▒▒▒▒▒"
"""What stands for the text of every record, whatever its length."""


def page_path(path: str | os.PathLike, is_public: bool) -> Path:
    """Return the path of a page, which says `.unprotected` unless its records are public."""
    path = Path(path)
    if is_public or ".unprotected" in path.suffixes:
        return path
    return path.with_name(f"{path.stem}.unprotected{path.suffix or '.html'}")


def write_report(comparison: dict[str, Any], path: str | os.PathLike) -> list[str]:
    """Write the page and the JSON file of a comparison: both, or none.

    Args:
        comparison: dict, as `compare` writes it as JSON and schemas/comparison.json describes it.
        path: path of the page. The JSON file has the same name with the suffix `.json`.

    Returns:
        List of strings that describe what was written.

    Raises:
        ImportError: If Jinja2 is not installed.
        OSError: If nothing can be written there.
    """
    path = Path(path)
    text = render(comparison)
    with new_folder(path.resolve().parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
        content = json.dumps(comparison, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        (folder / path.with_suffix(".json").name).write_text(content, encoding="utf-8")
    return [f"{path}: the page", f"{path.with_suffix('.json')}: its figures"]


def render(comparison: dict) -> str:
    """Return the HTML of a comparison. Everything that comes from it is escaped."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            f"A report needs Jinja2: pip install 'keras-vaultgemma[report]' ({error})"
        ) from error
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = (folder / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(css=css, **_view(comparison))


def _view(comparison):
    """Return the variables of the template."""
    date = datetime.date.fromisoformat(comparison["created"][:10])
    return {
        "name": comparison["name"],
        "date": f"{date.day} {date:%B %Y}",
        "version": comparison["code"]["keras_vaultgemma"],
        "unprotected": comparison["unprotected"],
        "verdict": comparison["verdict"],
        "claim": _claim(comparison),
        "squares": figures.squares(comparison),
        "exclusions": wording.exclusions(comparison),
        "utility": figures.utility(comparison),
        "tasks": figures.tasks(comparison),
        "memorization": leakage_figures.memorization(comparison),
        "examples": _examples(comparison),
        "membership": leakage_figures.membership(comparison),
        "audit": leakage_figures.audit(comparison),
        "provenance": _provenance(comparison),
        "annexes": wording.annexes(comparison),
        "words": wording.WORDS,
        "notes": comparison["notes"],
    }


def _claim(comparison):
    claim = comparison["claim"]
    view = {"status": claim["status"], "reason": claim["reason"], "rows": [], "runs": claim["runs"]}
    view["statements"] = [_statement(statement) for statement in claim["statements"]]
    if claim["status"] == "none":
        return view
    view |= {
        "epsilon_text": f"{claim['epsilon']:g}",
        "delta_text": wording.power(claim["delta"]),
        "unit": claim["unit"],
        "condition": claim["reason"],
        "strength": wording.strength(claim["epsilon"]),
        "pairs": wording.at_most(claim["limits"]["auc"]),
        "mismatch": "",
        "rows": [
            ("Unit of protection", claim["unit"]),
            ("Budget spent", budget(claim)),
            ("Neighbouring data sets", f"{claim['neighbouring']}: the record is there or is empty"),
            ("Mechanism", claim["mechanism"]),
            ("Records trained on", f"{claim['records']:,}"),
            ("Steps", f"{claim['steps']:,}"),
        ],
    }
    if claim["data_match"] == "no":
        view["mismatch"] = (
            "The ledger is about other records than those that were measured here, so that the "
            "measurements cannot test the claim"
        )
    limits = claim["limits"]
    rates = limits["true_positive_rates"]
    view["rows"] += [
        (
            "What it allows an attacker at most",
            f"{wording.at_most(limits['accuracy'])} of 100 guesses right if half of the records "
            f"were trained on; {wording.at_most(limits['auc'])} of 100 pairs told apart; "
            f"{wording.percent(round_up(rates['0.01'], 3))} of the records found if 1 of 100 "
            "unseen ones is accused wrongly",
        )
    ]
    return view


def _statement(statement):
    parts = [f"ε ≤ {statement['epsilon']}"]
    if "delta" in statement:
        parts.append(f"δ ≤ {statement['delta']}")
    text = ", ".join(parts)
    if statement.get("unit"):
        text += f" for {statement['unit']}"
    return f"{text} ({statement['source']})" if statement.get("source") else text


def _examples(comparison):
    """Return the rows of the table of the closest records, masked if there is no text."""
    return [
        {
            "style": name,
            "model": wording.TITLES[name].capitalize(),
            "record": f"{x['record']:,}",
            "distance": wording.percent(x["distance"]),
            "masked": x["text"] is None,
            "text": MASK if x["text"] is None else x["text"],
        }
        for name in ("private", "plain")
        for x in comparison["closest"].get(name, ())
    ]


def _provenance(comparison):
    matches = {
        "yes": "The ledger has the fingerprint of the training records: the claim is about them.",
        "no": "The ledger has the fingerprint of other records.",
        "unknown": "No ledger under the same key says which records were trained on.",
    }
    titles = {"train": "Training records", "held_out": "Held-out records"}
    code = comparison["code"]
    return {
        "models": [
            {
                "style": name,
                "title": wording.TITLES[name].capitalize(),
                "name": " with ".join(filter(None, (x["preset"], x["adapter"]))),
                "sha256": x["sha256"],
            }
            for name, x in comparison["models"].items()
        ],
        "data": [{"title": titles[name], **x} for name, x in comparison["data"].items()],
        "match": matches[comparison["claim"]["data_match"]],
        "code": [
            ("keras-vaultgemma", f"{code['keras_vaultgemma']}, sources {code['sha256']}"),
            ("Keras and backend", f"Keras {code['keras']}, {code['backend']}"),
            ("Python and NumPy", f"Python {code['python']}, NumPy {code['numpy']}"),
        ],
    }
