"""Recipe of `keras-vaultgemma compare`: a model before training, trained plainly, and privately."""

import datetime
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from keras_vaultgemma._files import read_json
from keras_vaultgemma._validation import check_integer
from keras_vaultgemma.data.text_files import TextRecords, read_records
from keras_vaultgemma.data.token_ids import unpad_rows
from keras_vaultgemma.evaluation import provenance, report
from keras_vaultgemma.evaluation.claim import find_claim
from keras_vaultgemma.evaluation.extraction import extract
from keras_vaultgemma.evaluation.likelihood import Likelihood, measure
from keras_vaultgemma.evaluation.membership import measure_membership
from keras_vaultgemma.evaluation.memorization import measure_memorization
from keras_vaultgemma.evaluation.parts import Parts
from keras_vaultgemma.evaluation.privacy_audit import audit
from keras_vaultgemma.recipes import sources
from keras_vaultgemma.recipes.finetune_output import RUN

CLOSEST = 3
"""Number of records of each model that the page shows, masked unless their text is asked for."""

BATCH_ROWS = 16
"""Rows of held-out text that are measured together, and whose likelihood is stored together."""

PACKAGES = {"jinja2": "Jinja2", "rapidfuzz": "rapidfuzz", "scipy": "SciPy"}


def compare(
    private: str | os.PathLike,
    train: Any,
    held_out: Any = None,
    *,
    base: str | os.PathLike | None = None,
    plain: str | os.PathLike | None = None,
    canaries: str | os.PathLike | None = None,
    html: str | os.PathLike = "report.html",
    text_column: str | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    sequence_length: int | None = None,
    prefix_length: int = 50,
    suffix_length: int = 50,
    max_records: int = 1000,
    dtype: str | None = None,
    show_text: bool = False,
    public_records: bool = False,
) -> str:
    """Compare models before training, trained plainly and privately, and write a page about them.

    The page says what the privacy ledger claims, and measures next to it: bits per byte of held-out
    records, how many training records are repeated, if an attacker can tell training records from
    held-out ones, and the lower bound of ε from an audit. Its file is named `….unprotected.html`,
    because these figures are computed on records without protection, unless the records are
    public. A JSON file with all figures has the same name. A killed call resumes.

    Args:
        private: string or path. The model that the page is about: a folder that `finetune` wrote,
            a preset, or an adapter that names its base.
        train: records that `plain` and `private` were trained on: a path of a file or data in
            memory, as for `finetune`.
        held_out: records of the same kind that no model has seen. Defaults to those that `finetune`
            holds out of `train`.
        base: string or path. The model before training. Defaults to what `private` was trained
            from.
        plain: string or path. A model that was trained without privacy. Defaults to None.
        canaries: path of the file that `evaluation.insert_canaries` wrote before training. Defaults
            to None, for no audit.
        html: path of the page. Defaults to "report.html".
        text_column: string, as for `finetune`. Defaults to that of the run.
        prompt_column: string, as for `finetune`. Defaults to that of the run.
        response_column: string, as for `finetune`. Defaults to that of the run.
        sequence_length: int. Tokens of a row. Defaults to that of the run or preset.
        prefix_length: int. Tokens of a record that are shown to a model. Defaults to 50.
        suffix_length: int. Tokens that it has to reproduce. Defaults to 50.
        max_records: int. Largest number of training records, and of held-out ones, to test; of
            more, evenly spread ones are taken. Defaults to 1,000.
        dtype: string. Dtype of the weights. Defaults to that of the preset.
        show_text: bool. If True, show text of records on the page. Defaults to `False`.
        public_records: bool. If True, the records are public and need no protection. Defaults to
            `False`.

    Returns:
        String of several lines: the verdict, and what was written.

    Raises:
        ValueError: If an argument is out of its range, or no record is long enough.
        ImportError: If Jinja2, rapidfuzz or SciPy is not installed.

    Example:

    ```python
    from keras_vaultgemma import compare

    tales = [f"Once there were {i} hares and a tortoise." for i in range(40)]
    print(compare("vaultgemma_tiny", tales[:20], tales[20:], prefix_length=4, suffix_length=4))
    ```
    """
    check_extras()
    check_integer("max_records", max_records)
    names = ("text_column", "prompt_column", "response_column", "group_column", "sequence_length")
    options = {name: None for name in names} | _options_of_run(private)
    given = dict(
        text_column=text_column, prompt_column=prompt_column, response_column=response_column
    )
    columns = given if any(given.values()) else {name: options[name] for name in given}
    train, held_out = _read(train, held_out, columns, options["group_column"])
    found = {"private": sources.find_source(private)}
    if plain is not None:
        found["plain"] = sources.find_source(plain)
    # A preset that `finetune` wrote is not its own base.
    start = base or options.get("preset") or found["private"].preset
    found["base"] = sources.find_source(start)
    page = report.page_path(html, public_records)
    parts = page.with_suffix(".parts")

    length = sequence_length or options["sequence_length"]
    settings = dict(prefix_length=prefix_length, suffix_length=suffix_length)
    comparison = {
        "format": report.FORMAT,
        "unprotected": None if public_records else report.UNPROTECTED,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": Path(private).resolve().name if Path(private).is_dir() else os.fspath(private),
        "models": _describe_models(found),
        "data": {},
        "code": provenance.describe_code(),
        "likelihood": {},
        "memorization": {},
        "membership": {},
        "audit": {},
        "closest": {},
    }
    reference = None
    for name in ("base", "plain", "private"):
        if name not in found:
            continue
        model = sources.load_model(found[name], dtype)
        if length:
            model.preprocessor.sequence_length = length
        if name == "base":
            reference = model
            members, unseen = (
                _rows(records, model, max_records) for records in (train, held_out)
            )
            for kind, records, rows in (("train", train, members), ("held_out", held_out, unseen)):
                comparison["data"][kind] = provenance.describe_data(records, len(rows))
        arguments = dict(checkpoint=parts)
        comparison["likelihood"][name] = _likelihood(model, held_out, parts, name)
        comparison["memorization"][name] = _measure(
            measure_memorization,
            (model, members),
            dict(
                controls=unseen,
                baseline=None if model is reference else reference,
                **settings,
                **arguments,
            ),
        )
        comparison["membership"][name] = _measure(
            measure_membership,
            (model, members, unseen),
            dict(reference=None if model is reference else reference, **arguments),
        )
        comparison["closest"][name] = _closest(model, members, settings, parts, show_text)
        if name == "private":
            dataset = comparison["data"]["train"]["fingerprint"]
            claim = find_claim(model.privacy.ledger, dataset)
            comparison["claim"] = claim.as_dict()
        if canaries is not None and model is not reference:
            stated = None
            if name == "private" and claim.limits is not None:
                stated = (claim.epsilon, claim.delta)
            comparison["audit"][name] = audit(
                model, canaries, reference=reference, claim=stated, **arguments
            ).as_dict()
    comparison["verdict"] = report.verdict(comparison)
    written = report.write_report(comparison, page)
    shutil.rmtree(parts, ignore_errors=True)
    return "\n".join([*report.summary(comparison), *written])


def check_extras():
    """Raise ImportError, which names the extra to install, if a package is missing."""
    for package, name in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"A report needs {name}: pip install 'keras-vaultgemma[eval]'")
