"""The tools behind docs/privacy/cookbook.md: what the cookbook's recipe computes, and the same job here."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.any_backend, pytest.mark.filterwarnings("ignore")]

BENCHMARK = Path(__file__).parents[1] / "tools" / "benchmark"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK)
    import cookbook_recipe

    return cookbook_recipe


def test_the_labels_that_reach_the_loss(recipe):
    """The collator trains on the prompt, and no `<eos>` has a label."""
    own, collated = recipe.labels()
    (prompt, prompt_size), (response, response_size) = own.prompt, own.response
    assert prompt == prompt_size and response == response_size  # the mask is on the left padding
    assert collated[:2] == own[:2]
    assert own.padding[0] and not collated.padding[0]
    assert own.end != "<eos>"


@pytest.mark.long
def test_the_steps_that_are_accounted(recipe):
    pytest.importorskip("opacus")
    run = recipe.train(36)
    assert run.planned == (72, 1 / 36)
    assert [len(step) for step in run.steps] == [8] * 4 + [12] + [8] * 3
    first = [row for step in run.steps[:5] for row in step][:36]
    assert sorted(first) == [*range(36)]  # each row once an epoch, so none was sampled
    rates = [rate * 36 for _, rate, count in run.history for _ in range(count)]
    assert rates == pytest.approx([8] * 4 + [12] + [8] * 3)
    assert 15.5 < run.epsilon(1e-5) < recipe.without_sampling(run, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["float32", "int4", "opacus"])
def test_the_same_job_here_and_there(tmp_path, name):
    if name == "opacus":
        pytest.importorskip("opacus")
    for file, count in (("train.csv", 40), ("validation.csv", 4)):
        with open(tmp_path / file, "w", newline="") as rows:
            table = csv.writer(rows)
            table.writerow(["dialogue", "section_text"])
            table.writerows([f"Doctor: {i}?", f"The patient said {i}."] for i in range(count))
    command = [sys.executable, BENCHMARK / "private_qa.py", tmp_path, "--runs", name, "--epochs=2"]
    command += ["--batch-size=10", "--length=24", "--backends", "torch"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = done.stdout.splitlines()[-1].split("|")
    assert cells[1].strip() == f"{name}, torch"
    before, after, epsilon, steps = map(float, cells[2:6])
    assert 0 < after < before and epsilon <= 8.01 and steps == 8
