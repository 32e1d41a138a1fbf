"""Recipe of `keras-vaultgemma compare`: a model before training, trained plainly, and privately."""

import datetime
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from keras_vaultgemma._files import read_json
from keras_vaultgemma._validation import check_integer
from keras_vaultgemma.data.text_files import TextRecords, read_records
from keras_vaultgemma.evaluation import provenance, report, verdict
from keras_vaultgemma.evaluation.lm_eval_model import import_lm_eval
from keras_vaultgemma.recipes import sources
from keras_vaultgemma.recipes.comparison_session import Session
from keras_vaultgemma.recipes.finetune_output import RUN

PACKAGES = {"jinja2": "Jinja2", "rapidfuzz": "rapidfuzz", "scipy": "SciPy"}


def compare(
    private: str | os.PathLike,
    train: Any,
    held_out: Any = None,
    *,
    base: str | os.PathLike | None = None,
    plain: str | os.PathLike | None = None,
    canaries: str | os.PathLike | None = None,
    tasks: str | None = None,
    include_path: str | os.PathLike | None = None,
    limit: float | None = None,
    html: str | os.PathLike = "report.html",
    text_column: str | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    sequence_length: int | None = None,
    prefix_length: int | None = None,
    suffix_length: int | None = None,
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
        canaries: path of the file that `evaluation.insert_canaries`, or `finetune`, wrote before
            training. Defaults to None, for no audit. The ledger's data include the canaries, so
            that without the file they are other data than `train`.
        tasks: string of names of benchmark tasks with commas, as for `evaluation.measure_tasks`.
            Defaults to None, for no tasks.
        include_path: path, as for `evaluation.measure_tasks`.
        limit: number, as for `evaluation.measure_tasks`.
        html: path of the page. Defaults to "report.html".
        text_column: string, as for `finetune`. Defaults to that of the run.
        prompt_column: string, as for `finetune`. Defaults to that of the run.
        response_column: string, as for `finetune`. Defaults to that of the run.
        sequence_length: int. Tokens of a row. Defaults to that of the run or preset.
        prefix_length: int. Tokens of a record that are shown to a model. Defaults to 50, or to half
            of the median record if that is shorter.
        suffix_length: int. Tokens that it has to reproduce. Defaults to as many.
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
        ImportError: If Jinja2, rapidfuzz or SciPy is not installed, or for `tasks`
            lm-evaluation-harness.

    Example:

    ```python
    from keras_vaultgemma import compare

    tales = [f"Once there were {i} hares and a tortoise." for i in range(40)]
    print(compare("vaultgemma_tiny", tales[:20], tales[20:], prefix_length=4, suffix_length=4))
    ```
    """
    check_extras()
    if tasks is not None:
        import_lm_eval()
    check_integer("max_records", max_records)
    check_integer("prefix_length", prefix_length, allow_none=True)
    check_integer("suffix_length", suffix_length, allow_none=True)
    options = _options_of_run(private)
    columns = dict(
        text_column=text_column, prompt_column=prompt_column, response_column=response_column
    )
    if not any(columns.values()):
        columns = {name: options.get(name) for name in columns}
    train, held_out = _read(train, held_out, columns, options.get("group_column"))
    found = {"private": sources.find_source(private)}
    # A preset that `finetune` wrote is not its own base.
    found["base"] = sources.find_source(base or options.get("preset") or found["private"].preset)
    if plain is not None:
        found["plain"] = sources.find_source(plain)
    page = report.page_path(html, public_records)
    session = Session(
        found,
        dtype,
        {
            "sequence_length": sequence_length or options.get("sequence_length"),
            "truncate": options.get("truncate"),
        },
        page.with_suffix(".parts"),
    )
    name = Path(private).resolve().name if Path(private).is_dir() else os.fspath(private)
    comparison = {
        "format": report.FORMAT,
        "unprotected": None if public_records else report.UNPROTECTED,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": name,
        "models": session.describe_models(),
        "code": provenance.describe_code(),
        "tasks": session.measure_tasks(tasks, include_path, limit),
        **session.measure(
            train, held_out, prefix_length, suffix_length, max_records, canaries, show_text
        ),
    }
    comparison["verdict"] = verdict.verdict(comparison)
    written = report.write_report(comparison, page)
    shutil.rmtree(session.parts, ignore_errors=True)
    return "\n".join([*verdict.summary(comparison), *written])


def check_extras():
    """Raise ImportError, which names the extra to install, if a package is missing."""
    for package, name in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"A report needs {name}: pip install 'keras-vaultgemma[report]'")


def _options_of_run(private):
    """Return the options of the run in a folder that `finetune` wrote, {} for other models."""
    if not Path(private).is_dir() or not sources.is_run(private):
        return {}
    options = read_json(Path(private) / RUN).get("options")
    return options if isinstance(options, dict) else {}


def _read(train, held_out, columns, group_column):
    """Return the training and the held-out `TextRecords`."""
    if held_out is None:
        return read_records(train, **columns, group_column=group_column).split()
    return tuple(
        records if isinstance(records, TextRecords) else read_records(records, **columns)
        for records in (train, held_out)
    )
