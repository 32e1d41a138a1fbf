"""Tasks of lm-evaluation-harness and their results (extra `eval`)."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import keras

from keras_vaultgemma.evaluation.card_tasks import card_tasks
from keras_vaultgemma.evaluation.lm_eval_model import import_lm_eval, lm_eval_model
from keras_vaultgemma.evaluation.results import Result

CARD = "card"
"""Name that stands for the five tasks of the model card."""


@dataclasses.dataclass(frozen=True)
class Metric(Result):
    """A metric of a task.

    Attributes:
        value: float.
        standard_error: float. None if the harness gives none.

    Example:

    ```python
    from keras_vaultgemma.evaluation import Metric

    print(Metric(value=0.68, standard_error=0.0109).as_dict())
    ```
    """

    value: float
    standard_error: float | None


@dataclasses.dataclass(frozen=True)
class TaskResult(Result):
    """Result of a task.

    Attributes:
        metrics: dict of `Metric`, such as "acc" and "acc_norm", as lm-evaluation-harness has them.
        shots: int. Number of examples in the context. None for a group of tasks.
        items: int. Number of items. None for a group of tasks.
        card: float. Google's figure for VaultGemma 1B with as many shots, a fraction; else None.

    Example:

    ```python
    from keras_vaultgemma.evaluation import TaskResult

    print(TaskResult(metrics={}, shots=0, items=1838, card=0.68).as_dict())
    ```
    """

    metrics: dict[str, Metric]
    shots: int | None
    items: int | None
    card: float | None


@dataclasses.dataclass(frozen=True)
class TaskResults(Result):
    """Results of tasks.

    Attributes:
        tasks: dict of `TaskResult`.
        unavailable: dict. For each task of the model card whose data cannot be read, the reason.
        pairs: int. Number of continuations that were scored.
        truncated: int. Number of them whose context was cut.
        truncation: string. "keep_bos" or "lm_eval".
        harness: string. Version of lm-evaluation-harness.

    Example:

    ```python
    from keras_vaultgemma.evaluation import TaskResults

    results = TaskResults({}, {}, pairs=0, truncated=0, truncation="keep_bos", harness="0.4.13")
    print(results.as_dict())
    ```
    """

    tasks: dict[str, TaskResult]
    unavailable: dict[str, str]
    pairs: int
    truncated: int
    truncation: str
    harness: str


def measure_tasks(
    model: keras.Model,
    tasks: str | Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    truncation: str = "keep_bos",
    score_bos: bool = False,
    max_length: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> TaskResults:
    """Evaluate a model on tasks of lm-evaluation-harness.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        tasks: list of names of tasks or groups, or a string of them with commas. "card" stands for
            the five tasks of the model card with their shots; those whose data cannot be read are
            left out and listed.
        include_path: path of a folder with tasks of your own, YAML files of the harness. They
            replace the harness's tasks of the same names. They may run Python code, so use only
            files that you trust. Defaults to None.
        limit: int, the number of items of each task, or a float below 1, their fraction. Defaults
            to all.
        num_fewshot: int. Number of examples in the context. Defaults to that of each task.
        truncation: string, as for `score_pairs`. Defaults to "keep_bos".
        score_bos: bool, as for `measure_rolling`. Defaults to False.
        max_length: int. Number of positions. Defaults to the model's.
        checkpoint: path of a folder or None, as for `score_pairs`.
        verbose: bool. If True, show progress bars on a terminal. Defaults to True.

    Returns:
        `TaskResults`.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
        ValueError: If a task is unknown or none is given.
        OSError: If the data of a task cannot be read.

    Example:

    ```python
    import json
    import pathlib
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    rows = [{"goal": "Once upon a", "choices": ["time", "table"], "gold": 0}] * 4
    pathlib.Path("rows.jsonl").write_text("\\n".join(map(json.dumps, rows)))
    task = {
        "task": "tales",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{goal}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    pathlib.Path("tales.yaml").write_text(json.dumps(task))  # JSON is YAML
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    results = evaluation.measure_tasks(model, "tales", include_path=".")
    print(results.tasks["tales"].metrics["acc"].value)  # 1.0
    ```
    """
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f"`tasks` must have at least one name. Received: tasks={tasks!r}")
    lm_eval = import_lm_eval()
    manager = _find_tasks(names, include_path)
    lm = lm_eval_model(
        model,
        truncation=truncation,
        score_bos=score_bos,
        max_length=max_length,
        checkpoint=checkpoint,
        verbose=verbose,
    )
    results, unavailable = {}, {}

    def evaluate(names, shots):
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=names,
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
        results.update(_results(found))

    if CARD in names:
        for task in card_tasks():
            try:
                manager.load([task.name])
            except (OSError, ValueError) as error:
                # datasets raises ValueError for a cache without the wanted configuration.
                unavailable[task.name] = str(error).partition("\n")[0]
            else:
                evaluate([task.name], task.shots if num_fewshot is None else num_fewshot)
    if others := [name for name in names if name != CARD]:
        evaluate(others, num_fewshot)
    version = importlib.metadata.version("lm_eval")
    return TaskResults(results, unavailable, lm.pairs, lm.truncated, truncation, version)


def _find_tasks(names, include_path):
    """Return the `TaskManager` that knows the names, or raise ValueError."""
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else os.fspath(include_path)
    if path is not None:
        # Alone, because the index of the harness's own 14,000 files takes 10 s.
        manager = TaskManager(include_path=path, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=path)
    unknown = [name for name in names if name != CARD and not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            "`tasks` must be names of tasks of lm-evaluation-harness, of `include_path`, or "
            f"{CARD!r}. Received: {', '.join(unknown)}"
        )
    return manager


def _results(found: dict[str, Any]) -> dict[str, TaskResult]:
    """Return a `TaskResult` for each task and group in the results of the harness."""
    figures = {(task.name, task.shots): task.figure for task in card_tasks()}
    results = {}
    for name, values in found["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, _, rule = key.partition(",")  # "acc,none" or "exact_match,remove_whitespace"
            if not rule or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{rule}")
            known = isinstance(error, (int, float))
            metrics[metric if rule == "none" else f"{metric} ({rule})"] = Metric(
                float(value), float(error) if known else None
            )
        shots = found["n-shot"].get(name)
        items = found["n-samples"].get(name, {}).get("effective")
        results[name] = TaskResult(metrics, shots, items, figures.get((name, shots)))
    return results
