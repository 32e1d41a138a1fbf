"""Benchmark tasks under a model: what `keras-vaultgemma evaluate --tasks` does."""

import json
from pathlib import Path

from keras_vaultgemma import backend
from keras_vaultgemma._files import new_folder
from keras_vaultgemma._validation import check_integer, check_number
from keras_vaultgemma._version import __version__
from keras_vaultgemma.evaluation.lm_eval_model import import_lm_eval
from keras_vaultgemma.evaluation.tasks import measure_tasks
from keras_vaultgemma.recipes.sources import find_source, load_model

RESULTS, PARTS = "results.json", "parts"


def evaluate_tasks(
    tasks,
    preset=None,
    *,
    adapter=None,
    include_path=None,
    limit=None,
    num_fewshot=None,
    output=None,
    truncation="keep_bos",
    score_bos=False,
    sequence_length=None,
    dtype=None,
    quantization=None,
    as_json=False,
):
    """Evaluate a model on tasks of lm-evaluation-harness.

    Args:
        tasks: string of names with commas, or list of names, as for `evaluation.measure_tasks`.
        preset: string or path, as for `sources.find_source`. Defaults to the base of `adapter`, and
            to "vaultgemma_tiny" without one.
        adapter: string or path, as for `sources.find_source`. Defaults to None.
        include_path: path, as for `evaluation.measure_tasks`.
        limit: number, as for `evaluation.measure_tasks`.
        num_fewshot: int, as for `evaluation.measure_tasks`.
        output: path of a folder for the results, and for finished parts, from which the same
            call resumes after it was killed. Defaults to None.
        truncation: string, as for `evaluation.measure_tasks`. Defaults to "keep_bos".
        score_bos: bool, as for `evaluation.measure_tasks`. Defaults to False.
        sequence_length: int. Number of positions. Defaults to the model's.
        dtype: string. Dtype of the weights. Defaults to that of the preset.
        quantization: string, "int8" or "int4". Quantize the weights. Defaults to None.
        as_json: bool. If True, return the contents of `results.json`. Defaults to `False`.

    Returns:
        String: a table, or a JSON object.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
        ValueError: If a task is unknown or an argument is out of its range.
        OSError: If data cannot be read or results cannot be written.
    """
    import_lm_eval()  # before the model is loaded
    check_number("limit", limit, above=0, allow_none=True)
    if limit is not None and limit >= 1:
        limit = int(limit)
    check_integer("num_fewshot", num_fewshot, minimum=0, allow_none=True)
    source = find_source(preset, adapter)
    model = load_model(source, dtype, quantization)
    results = measure_tasks(
        model,
        tasks,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        truncation=truncation,
        score_bos=score_bos,
        max_length=sequence_length,
        checkpoint=None if output is None else Path(output) / PARTS,
    )
    document = {
        "model": str(source.preset),
        "adapter": None if source.adapter is None else str(source.adapter),
        "backend": backend.NAME,
        "dtype": model.dtype_policy.name,
        "version": __version__,
        "limit": limit,
        **results.as_dict(),
    }
    text = json.dumps(document, indent=2)
    if output is not None:
        with new_folder(output) as folder:
            (folder / RESULTS).write_text(text, encoding="utf-8")
    return text if as_json else _table(source, results)


def _table(source, results):
    with_adapter = "" if source.adapter is None else f" with {source.adapter}"
    rows = [("task", "shots", "items", "metric", "value", "model card")]
    for name, task in results.tasks.items():
        for metric, measured in task.metrics.items():
            error = measured.standard_error
            value = f"{measured.value:.4f}" + ("" if error is None else f" ± {error:.4f}")
            card = "" if task.card is None else f"{task.card:.4f}"
            rows.append((name, _text(task.shots), _text(task.items), metric, value, card))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [f"{name}: no data ({reason})" for name, reason in results.unavailable.items()]
    if results.pairs:
        lines.append(
            f"{results.truncated:,} of {results.pairs:,} contexts were longer than the model's "
            f"positions ({results.truncation})"
        )
    return "\n".join([f"{source.preset}{with_adapter}", *lines])


def _text(value):
    return "" if value is None else f"{value:,}"
