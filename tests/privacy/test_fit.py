"""A private `fit`: budgets, the ledger, and runs that are killed."""

import json
import os
import subprocess
import sys
from collections import deque
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from common import LINES, one_layer_preset
from privacy_cases import (
    BATCH,
    ROWS,
    C,
    TwoTexts,
    fit,
    language_model,
    some_rows,
    tiny_model,
    values,
)

from keras_vaultgemma import VaultGemmaCausalLM, lora, privacy
from keras_vaultgemma.privacy import accounting, sampling
from keras_vaultgemma.privacy import fit as private_fit
from keras_vaultgemma.privacy.budget import steps_within
from keras_vaultgemma.privacy.ledger import FILE, preset_ledger, read_ledger
from keras_vaultgemma.privacy.ledger_writer import OpenRun
from keras_vaultgemma.recipes.convert import convert
from keras_vaultgemma.recipes.describe import describe

pytestmark = [
    pytest.mark.first_backend,
    pytest.mark.filterwarnings("ignore::keras_vaultgemma.privacy.NotPrivateWarning"),
]


@pytest.mark.every_backend
def test_epsilon_stays_within_the_budget_and_is_reported():
    model = language_model(4, dpsgd=dict(epsilon=2.0, noise_multiplier=None, seed_for_tests=None))
    history = fit(model, epochs=2)
    spent = model.privacy.spent()
    assert history["epsilon"][0] < spent.epsilon <= 2.0
    assert spent.epsilon > 1.95 and spent.epsilon == history["epsilon"][-1]
    assert (spent.delta, spent.steps, spent.unit) == (1e-4, 8, "one row of at most 9 tokens")
    assert (spent.mechanism, spent.neighbouring) == (
        "DP-SGD with truncated Poisson sampling",
        "zero-out",
    )
    ((run, count),) = model.privacy.ledger.runs
    expected = accounting.epsilon([run.steps(count)], 1e-4)
    assert spent.epsilon == accounting.round_up(expected)
    assert (run.rows, run.sampling_probability, run.clip_norm, run.planned_steps) == (
        ROWS,
        BATCH / ROWS,
        C,
        8,
    )


@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_a_seeded_run_is_reported_as_not_private(tmp_path):
    """In `spent`, the ledger, saved presets and `info`, together with all runs that it composes with."""
    model = tiny_model(extend_budget=True)
    model.fit(LINES, batch_size=2, verbose=0)
    assert model.privacy.spent().is_private
    settings = privacy.DPSGD(noise_multiplier=1.0, delta=1e-4, extend_budget=True, seed_for_tests=3)
    model.compile(keras.optimizers.Adam(1e-3), privacy=settings)
    model.fit(LINES, batch_size=2, verbose=0)
    spent = model.privacy.spent()
    assert not spent.is_private and spent.steps == 4
    kind = "DP-SGD with truncated Poisson sampling"
    assert spent.mechanism == f"{kind}; NOT private, seeded for tests: {kind}"
    lora.merge(model)
    model.save_to_preset(tmp_path / "preset")
    assert preset_ledger(tmp_path / "preset") == model.privacy.ledger
    assert (
        "NOT private" in model.privacy.ledger.describe()[1]
        and "NOT" not in model.privacy.ledger.describe()[0]
    )
    description = " ".join(describe(str(tmp_path / "preset")).split())
    assert f"NOT private, seeded for tests: ε = {spent.epsilon:g} at δ" in description


@pytest.mark.parametrize(
    "budget", [dict(epsilon=2.0, noise_multiplier=None), dict(noise_multiplier=1.0)]
)
def test_a_second_fit_needs_extend_budget(budget):
    model = language_model(4, dpsgd=budget)
    fit(model)
    first = model.privacy.spent()
    with pytest.raises(ValueError, match=r"budget for these rows is used up.*extend_budget=True"):
        fit(model)
    assert model.privacy.spent() == first
    # Other data have a budget of their own.
    fit(model, some_rows(ROWS, seed=9))
    assert model.privacy.spent().steps == 4 and len(model.privacy.ledger.spent()) == 2
    model.compile(
        keras.optimizers.SGD(1.0),
        privacy=privacy.DPSGD(**{"delta": 1e-4, **budget}, extend_budget=True),
    )
    fit(model)
    assert model.privacy.spent().steps == 8 and model.privacy.spent().epsilon > first.epsilon


def test_the_rest_of_a_budget_can_be_used():
    """After half of the steps, a second `fit` is calibrated to the rest of ε, or does the rest of the steps."""

    def stop_after(count):
        return keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: setattr(
                model, "stop_training", batch + 1 == count
            )
        )

    model = language_model(4, dpsgd=dict(epsilon=2.0, noise_multiplier=None))
    fit(model, callbacks=[stop_after(2)])
    assert model.privacy.spent().steps == 2
    fit(model)
    assert model.privacy.spent().steps == 6 and 1.95 < model.privacy.spent().epsilon <= 2.0

    model = language_model(4)
    fit(model, callbacks=[stop_after(2)])
    budget = accounting.epsilon([model.privacy.ledger.runs[0][0].steps(4)], 1e-4)
    with pytest.warns(
        UserWarning, match="The budget for these rows ends after 2 more steps, and so does `fit`"
    ):
        fit(model, epochs=3)
    assert (
        model.privacy.spent().steps == 4
        and model.privacy.spent().epsilon == accounting.round_up(budget)
    )


@pytest.mark.parametrize("limit, expected", [(0.0, 0), (1e9, 7)])
def test_steps_within_a_limit(limit, expected):
    steps = accounting.Steps(7, 100, 0.1, None, 1.0)
    assert steps_within(limit, [], steps, 1e-5) == expected
    for count in (1, 3, 6):
        exact = accounting.epsilon([steps._replace(count=count)], 1e-5)
        assert steps_within(exact, [], steps, 1e-5) == count


@pytest.mark.every_backend
def test_a_second_fit_draws_other_rows_and_other_noise(monkeypatch):
    """Even with a fixed seed, because the sampler is keyed by the optimizer's step number."""
    seen = []
    draw = sampling.sample_rows
    monkeypatch.setattr(
        sampling,
        "sample_rows",
        lambda secret, step, *a, **k: (seen.append((secret, step)), draw(secret, step, *a, **k))[1],
    )
    model = language_model(4, dpsgd=dict(extend_budget=True))
    for _ in range(2):
        fit(model)
    assert {step for _, step in seen} == set(range(8)) and len({secret for secret, _ in seen}) == 1
    seen.clear()
    model = language_model(4, dpsgd=dict(extend_budget=True, seed_for_tests=None))
    for _ in range(2):
        fit(model)
    assert len({secret for secret, _ in seen}) == 2


@pytest.mark.every_backend
def test_steps_before_an_error_are_counted():
    model = language_model(4)

    def fail(batch, logs):
        if batch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(model, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=fail)])
    assert model.privacy.spent().steps == 3 and model.privacy.run is None


def test_nothing_is_trained_if_the_ledger_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    model = language_model(4, dpsgd=dict(ledger=tmp_path / "file" / "ledger.jsonl"))
    before = values(model)
    with pytest.raises(OSError):
        fit(model)
    assert all((old == new).all() for old, new in zip(before, values(model), strict=True))


@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_the_ledger_is_saved_with_the_weights(tmp_path):
    """In presets, adapters and converted checkpoints."""
    from keras_vaultgemma.recipes.describe import describe

    model = tiny_model()
    model.fit(LINES, batch_size=2, verbose=0)
    found, spent = model.privacy.ledger, model.privacy.spent()
    lora.save_adapter(model, tmp_path / "adapter")
    fresh = VaultGemmaCausalLM.from_preset(one_layer_preset())
    lora.load_adapter(fresh, tmp_path / "adapter")
    assert fresh.privacy.ledger == found and fresh.privacy.spent() == spent

    lora.merge(model)
    model.save_to_preset(tmp_path / "preset")
    again = VaultGemmaCausalLM.from_preset(tmp_path / "preset")
    assert again.privacy.ledger == found
    # Later runs on the same data compose with the loaded ones, and the budget is still the same.
    again.backbone.enable_lora(4)
    again.preprocessor.sequence_length = 24
    again.compile(
        keras.optimizers.Adam(1e-3),
        privacy=privacy.DPSGD(noise_multiplier=1.0, delta=1e-4, extend_budget=True),
    )
    again.fit(LINES, batch_size=2, verbose=0)
    assert again.privacy.spent().steps == 4 and len(again.privacy.ledger.spent()) == 1

    convert(tmp_path / "preset", tmp_path / "converted", to="hf", progress=False)
    assert preset_ledger(tmp_path / "converted") == found
    assert (
        "trained privately since: 2 steps of DP-SGD"
        in (tmp_path / "converted" / "README.md").read_text()
    )
    metadata = json.loads((tmp_path / "converted" / "metadata.json").read_text())
    assert FILE in metadata["files"]
    description = describe(str(tmp_path / "preset"))
    assert (
        "Private training" in description and f"ε = {spent.epsilon:g} at δ = 0.0001" in description
    )


@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_texts_are_recognised_in_any_form():
    """In any order, container and sequence length."""
    model = tiny_model(extend_budget=True)
    model.fit(LINES, batch_size=2, verbose=0)
    model.preprocessor.sequence_length = 16
    model.fit(tuple(LINES[::-1]), batch_size=2, verbose=0)
    model.fit(TwoTexts(), batch_size=2, verbose=0)
    assert len(model.privacy.ledger.spent()) == 1 and model.privacy.spent().steps == 6


@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_a_dataset_is_the_same_in_every_container():
    rows = [{"id": i, "text": line} for i, line in enumerate(LINES)]
    containers = [LINES, rows, {"text": LINES}, np.array(LINES), deque(LINES)]
    if find_spec("pandas"):
        import pandas

        containers += [pandas.DataFrame(rows), pandas.Series(LINES)]
    if find_spec("datasets"):
        import datasets

        containers += [datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows)["text"]]
    model = tiny_model(extend_budget=True)
    for container in containers:
        model.fit(container, batch_size=2, verbose=0)
    runs = [run for run, _ in model.privacy.ledger.runs]
    assert len({run.dataset for run in runs}) == 1 and len(runs) == len(containers)
    with pytest.raises(ValueError, match="a list of rows first. Received: dict_values"):
        model.fit(dict(enumerate(LINES)).values(), verbose=0)


def test_ids_are_recognised_with_any_dtype_and_weights():
    model = language_model(4, dpsgd=dict(extend_budget=True))
    x, y, weight = some_rows(ROWS)
    fit(model, (x, y, weight))
    fit(model, (keras.tree.map_structure(np.int64, x), y.astype("int64"), np.ones_like(weight)))
    fit(model, (keras.tree.map_structure(np.uint16, x), y.astype("int8"), None))
    assert len(model.privacy.ledger.spent()) == 1 and model.privacy.spent().steps == 12
    fit(model, (x, np.roll(y, 1), weight))
    assert len(model.privacy.ledger.spent()) == 2


def test_a_budget_is_not_spent_by_two_runs_at_once(tmp_path, monkeypatch):
    path, model = tmp_path / FILE, language_model(4, dpsgd=dict(ledger=tmp_path / FILE))
    plan_run = private_fit.plan_run

    def before_another_run(*args, **kwargs):
        planned = plan_run(*args, **kwargs)
        monkeypatch.setattr(private_fit, "plan_run", plan_run)
        other = language_model(4)
        fit(other)
        OpenRun(path, other.privacy.ledger.runs[0][0], other.privacy.ledger).close()
        return planned

    monkeypatch.setattr(private_fit, "plan_run", before_another_run)
    message = "must have one writer. Received: a run that began while this one was planned"
    with pytest.raises(ValueError, match=message):
        fit(model)
    with pytest.raises(ValueError, match="`spent` needs a private run"):
        model.privacy.spent()


KILLED = """
import os, random, signal, sys, time
folder, count = sys.argv[1], int(sys.argv[2])
import keras, numpy as np
sys.path[:0] = sys.argv[3:]
from keras_vaultgemma import TrainingCheckpoint, VaultGemmaCausalLM, privacy
from common import random_backbone
from privacy_cases import SMALL, some_rows

def train(run):
    model = VaultGemmaCausalLM(random_backbone(**SMALL))
    model.backbone.enable_lora(2)
    model.compile(keras.optimizers.SGD(0.1), privacy=privacy.DPSGD(noise_multiplier=1.0, delta=1e-4))
    def report(batch, logs):
        open(f"{folder}/{run}.begun", "a").write(".")  # one byte for each step that may have released something
    begun = keras.callbacks.LambdaCallback(on_train_batch_end=report)
    x, y, weight = some_rows(400)
    callbacks = [TrainingCheckpoint(f"{folder}/{run}", save_freq=1), begun]
    model.fit(x, y, sample_weight=weight, batch_size=2, epochs=9, verbose=0, callbacks=callbacks)

rng = random.Random(7)
for run in range(count):
    child = os.fork()  # a process that has imported everything and computed nothing yet
    if not child:
        train(run)
        os._exit(0)
    while not os.path.exists(f"{folder}/{run}.begun") and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.any_backend
@pytest.mark.parametrize("kills", [10, pytest.param(30, marks=pytest.mark.long)])
def test_kill_minus_nine_at_random_points(tmp_path, kills):
    """The ledger counts at least the steps that were done, so that ε is never under-reported."""
    (tmp_path / "runs").mkdir()
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(tmp_path / "runs"),
        str(kills),
        str(Path(__file__).parent),
        str(Path(__file__).parents[1]),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}, timeout=500)
    checked = 0
    for run in range(kills):
        done = len((tmp_path / "runs" / f"{run}.begun").read_bytes())
        ((entry, counted),) = read_ledger(tmp_path / "runs" / str(run) / FILE).runs
        assert done <= counted <= done + 1 + 2 * entry.block
        checked += done > 1
        if run % 10 == 0:
            assert accounting.epsilon([entry.steps(counted)], 1e-4) >= accounting.epsilon(
                [entry.steps(done)], 1e-4
            )
    assert checked > kills // 3
