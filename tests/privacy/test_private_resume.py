"""A private `fit` that is killed and resumed: its weights, its budget and its ledger."""

import shutil

import keras
import numpy as np
import pytest
from privacy_cases import ROWS, fit, language_model, some_rows, values

from keras_vaultgemma import TrainingCheckpoint, backend
from keras_vaultgemma.privacy import ledger
from keras_vaultgemma.privacy.ledger import read_ledger
from keras_vaultgemma.training import checkpoint
from keras_vaultgemma.training.state import read_state_arrays

pytestmark = [
    pytest.mark.first_backend,
    pytest.mark.filterwarnings("ignore::keras_vaultgemma.privacy.NotPrivateWarning"),
]

BUDGET = dict(epsilon=2.0, noise_multiplier=None)


class Killed(Exception):
    pass


def train(folder, dpsgd=None, killed_at=None, each=lambda: None, **arguments):
    """Return a model after a `fit` with a checkpoint after each step, killed when step `killed_at` (from 1) begins."""
    model, begun = language_model(4, dpsgd=dpsgd), []

    def begin(batch, logs):
        begun.append(batch)
        each()
        if len(begun) == killed_at:
            raise Killed

    callbacks = [
        TrainingCheckpoint(folder, save_freq=1),
        keras.callbacks.LambdaCallback(on_train_batch_begin=begin),
    ]
    fit(model, callbacks=callbacks, **arguments)
    return model


@pytest.mark.parametrize("rank", [None, pytest.param(4, marks=pytest.mark.every_backend)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, rank):
    """Bit for bit on JAX."""

    def train(folder, killed_at=None):
        model = language_model(
            rank, optimizer=keras.optimizers.Adam(1e-2), lora_arguments=dict(dropout=0.1)
        )
        steps = []

        def count(batch, logs):
            steps.append(batch)
            if len(steps) == killed_at:
                raise Killed

        callbacks = [
            TrainingCheckpoint(folder, save_freq=1),
            keras.callbacks.LambdaCallback(on_train_batch_begin=count),
        ]
        fit(model, epochs=2, callbacks=callbacks)
        return model

    uninterrupted = train(tmp_path / "uninterrupted")
    for killed_at in (3, 3):  # The second time, of the remaining steps.
        with pytest.raises(Killed):
            train(tmp_path / "killed", killed_at)
    resumed = train(tmp_path / "killed")
    tolerance = 0 if backend.NAME == "jax" else 1e-6
    for one, two in zip(values(uninterrupted), values(resumed), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=tolerance)
    # The steps that were killed are in the ledger and count, and were done again.
    assert uninterrupted.privacy.spent().steps == 8 and resumed.privacy.spent().steps == 8 + 2
    assert resumed.privacy.ledger == read_ledger(tmp_path / "killed" / ledger.FILE)


def test_a_resumed_run_stays_within_the_budget(tmp_path):
    """Steps that a killed run may have released count, and the noise of the others is calibrated to the rest of ε."""
    dpsgd = dict(epsilon=2.0, noise_multiplier=None)

    def stop(batch, logs):
        if batch == 2:
            raise Killed

    with pytest.raises(Killed):
        callbacks = [
            TrainingCheckpoint(tmp_path, save_freq=1),
            keras.callbacks.LambdaCallback(on_train_batch_begin=stop),
        ]
        fit(language_model(4, dpsgd=dpsgd), callbacks=callbacks)
    model = language_model(4, dpsgd=dpsgd)
    fit(model, callbacks=[TrainingCheckpoint(tmp_path, save_freq=1)])
    first, second = model.privacy.ledger.runs
    assert (first[1], second[1]) == (3, 2) and second[0].noise_multiplier > first[
        0
    ].noise_multiplier
    assert 1.9 < model.privacy.spent().epsilon <= 2.0


@pytest.mark.parametrize(
    "dpsgd", [BUDGET, {}, dict(BUDGET, extend_budget=True)], ids=["epsilon", "noise", "extended"]
)
def test_a_finished_run_returns_at_once(tmp_path, dpsgd):
    """It has its weights and releases nothing, even if the budget is used up."""
    first = train(tmp_path, dpsgd)
    again = train(tmp_path, dpsgd)
    assert again.privacy.spent() == first.privacy.spent() and again.privacy.spent().steps == 4
    for one, two in zip(values(first), values(again), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_run_that_is_killed_in_its_last_step_ends_with_the_checkpoint(tmp_path):
    """The ledger counts the last step, which may have been released, and the budget does not suffice for another."""
    with pytest.raises(Killed):
        train(tmp_path, BUDGET, killed_at=4)
    saved = dict(read_state_arrays(tmp_path / checkpoint.FILE, "weight"))
    model = language_model(4, dpsgd=BUDGET)
    with pytest.warns(
        UserWarning, match="used up: .* `fit` ends with the checkpoint's weights, 1 steps early"
    ):
        fit(model, callbacks=[TrainingCheckpoint(tmp_path, save_freq=1)])
    for one, two in zip(values(model), saved.values(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert model.privacy.spent().steps == 4 and 1.95 < model.privacy.spent().epsilon <= 2.0


@pytest.mark.parametrize("lost", ["deleted", "another", "older", "left behind"])
def test_a_checkpoint_without_its_ledger_is_rejected(tmp_path, lost):
    """The steps of its weights would not be counted."""
    folder, saved, dpsgd = tmp_path / "run", [], {}
    path = folder / ledger.FILE
    with pytest.raises(Killed):
        train(folder, killed_at=3, each=lambda: saved.append(path.read_bytes()))
    whole = path.read_bytes()
    if lost == "deleted":
        path.unlink()
    elif lost == "another":
        dpsgd["ledger"] = tmp_path / "another.jsonl"
    elif lost == "older":
        path.write_bytes(saved[0])
    else:
        folder = tmp_path / "copy"
        folder.mkdir()
        shutil.copy(path.with_name(checkpoint.FILE), folder)
    found = 1 if lost == "older" else 0
    message = f"must count all 2 private steps that the checkpoint's weights come from. Received: {found} of them"
    with pytest.raises(ValueError, match=message):
        train(folder, dpsgd)
    path.write_bytes(whole)
    assert train(tmp_path / "run").privacy.spent().steps == 5


@pytest.mark.parametrize("dpsgd", [{}, dict(BUDGET, extend_budget=True)], ids=["noise", "extended"])
def test_more_epochs(tmp_path, dpsgd):
    first = train(tmp_path, dpsgd)
    more = train(tmp_path, dpsgd, epochs=3)
    assert (first.privacy.spent().steps, more.privacy.spent().steps) == (4, 12)
    assert more.privacy.spent().epsilon > first.privacy.spent().epsilon
    assert TrainingCheckpoint(tmp_path).position == {"epoch": 3, "batch": 0, "is_finished": False}


def test_a_checkpoint_of_other_data_is_rejected(tmp_path, monkeypatch):
    """Also of data of the same size. Under another key, which makes them incomparable, they count as the same."""
    with pytest.raises(Killed):
        train(tmp_path, killed_at=3)
    with pytest.raises(ValueError, match="belongs to another run: its data had fingerprint = "):
        train(tmp_path, rows=some_rows(ROWS, seed=9))
    with pytest.raises(
        ValueError,
        match=f"belongs to another run: its data had rows = {ROWS}. Received: {ROWS - 1}",
    ):
        train(tmp_path, rows=some_rows(ROWS - 1))
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "another home"))
    assert train(tmp_path).privacy.spent().steps == 5
