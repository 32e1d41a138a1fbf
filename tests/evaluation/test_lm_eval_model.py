"""The model for lm-evaluation-harness, next to the harness's own model "hf" on the exported folder.

Skipped where the harness is not installed: `pip install "keras-vaultgemma[eval]"`.
"""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from common import LINES, check_schema, one_layer_preset

from keras_vaultgemma import VaultGemmaCausalLM, convert
from keras_vaultgemma.cli import main
from keras_vaultgemma.evaluation import card_tasks, lm_eval_model, measure_tasks

lm_eval = pytest.importorskip("lm_eval")

WORDS = ("wolf", "lamb", "hare", "tortoise", "crow", "fox", "lion", "ass")
POSITIONS = 32  # so that some contexts and texts are longer


def requests(*arguments):
    return [SimpleNamespace(args=x) for x in arguments]


PAIRS = requests(
    *[
        (f"Question: What did the {a} say to the {b}?\nAnswer:", f" {text}")
        for a, b in itertools.pairwise(WORDS)
        for text in (f"The {b} is late.", f"No {a}, no {b}, and much of the old forest.")
    ],
    *[("", f"The {a} {verb} here.") for a in WORDS for verb in ("was", "were")],
    *[(line, " and so on") for line in LINES],
    ("One space ", "before"),
    ("One word", " after"),
)
TEXTS = requests(*[(line,) for line in LINES], (" ".join(LINES),), ("Once",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    convert(one_layer_preset(), folder, to="hf")
    return folder


@pytest.fixture(scope="module")
def hf(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=8, max_length=POSITIONS
    )


@pytest.fixture(scope="module")
def model():
    return VaultGemmaCausalLM.from_preset(one_layer_preset())


@pytest.fixture(scope="module")
def ours(model):
    return lm_eval_model(model, truncation="lm_eval", score_bos=True, max_length=POSITIONS)


def test_log_probabilities_and_greedy_flags_are_those_of_hf(ours, hf):
    found, expected = ours.loglikelihood(PAIRS), hf.loglikelihood(PAIRS, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert ours.truncated > 0


def test_rolling_likelihoods_are_those_of_hf(ours, hf):
    found = ours.loglikelihood_rolling(TEXTS)
    expected = hf.loglikelihood_rolling(TEXTS, disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert sum(found) == pytest.approx(sum(expected), rel=1e-6)


def test_generated_texts_are_those_of_hf(ours, hf):
    options = {"until": [".", "\n", " the"], "max_gen_toks": 8, "do_sample": False}
    prompts = requests(*[(line, options) for line in LINES], ("Once upon a", options))
    assert ours.generate_until(prompts) == hf.generate_until(prompts, disable_tqdm=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder with a task of the harness."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"line": line[:40], "choices": ["time", "forest it was"], "gold": i % 2}
        for i, line in enumerate(LINES * 3)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tales",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{line}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "tales.yaml").write_text(json.dumps(task))
    return folder


@pytest.mark.first_backend
def test_tasks_have_the_results_of_hf(model, hf, tasks):
    found = measure_tasks(
        model, "tales", include_path=tasks, num_fewshot=1, truncation="lm_eval", max_length=32
    )
    expected = lm_eval.simple_evaluate(
        model=hf,
        tasks=["tales"],
        num_fewshot=1,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["tales"]
    result = found.tasks["tales"]
    assert (result.shots, result.items, result.card) == (1, 12, None)
    for name, metric in result.metrics.items():
        assert metric.value == expected[f"{name},none"]
    assert found.truncated > 0


@pytest.mark.first_backend
def test_the_command_writes_results_and_resumes(tasks, tmp_path, capsys, monkeypatch):
    command = [
        *("evaluate", str(one_layer_preset()), "--tasks", "tales", "--include-path", str(tasks)),
        *("--limit", "8", "--num-fewshot", "0", "--output", str(tmp_path / "out")),
    ]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "tales  0      8      acc " in table
    assert table.endswith("0 of 16 contexts were longer than the model's positions (keep_bos)\n")
    results = json.loads((tmp_path / "out/results.json").read_text())
    check_schema(results, "tasks")
    assert results["tasks"]["tales"]["items"] == 8 and results["limit"] == 8

    monkeypatch.setattr(VaultGemmaCausalLM, "score_branches", None)  # all parts are stored
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results


@pytest.mark.first_backend
def test_tasks_of_the_card_without_data_are_listed(model, monkeypatch):
    manager = SimpleNamespace(load=lambda names: exec("raise OSError('offline\\nand more')"))
    monkeypatch.setattr("keras_vaultgemma.evaluation.tasks._find_tasks", lambda *names: manager)
    found = measure_tasks(model, ["card"])
    assert not found.tasks and set(found.unavailable.values()) == {"offline"}
    assert list(found.unavailable) == [task.name for task in card_tasks()]


@pytest.mark.first_backend
@pytest.mark.long  # indexing the harness's own tasks takes 10 s
def test_unknown_tasks_are_an_error(model, tasks):
    message = "`tasks` must be names of tasks of .*, or 'card'. Received: tails"
    with pytest.raises(ValueError, match=message):
        measure_tasks(model, "tales,tails", include_path=tasks)
    with pytest.raises(
        ValueError, match="`tasks` must have at least one name. Received: tasks=','"
    ):
        measure_tasks(model, ",")
