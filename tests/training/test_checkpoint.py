"""Runs that are interrupted and resumed. `Interrupt` raises an error; one test kills processes."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from common import to_numpy
from runs import (
    IDS,
    LABELS,
    TOLERANCE,
    Batches,
    Interrupt,
    WithWorkers,
    assert_equal,
    fit,
    forget,
    fresh,
    messages,
    small,
    state,
)

from keras_vaultgemma import TrainingCheckpoint
from keras_vaultgemma.training.checkpoint import FILE
from keras_vaultgemma.training.state import (
    GROUPS,
    assign_values,
    copy_values,
    read_state_arrays,
    read_state_metadata,
)

STEPS = 3
"""Batches of an epoch: 4, 4 and 2 rows."""


def lora():
    model = small()
    model.backbone.enable_lora(2, dropout=0.3)
    model.compile(keras.optimizers.Adam(0.01))
    return model


def accumulating_gradients():
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 3, warmup_target=0.03, warmup_steps=2)
    return small(
        keras.optimizers.Adam(schedule, gradient_accumulation_steps=2), dtype="mixed_bfloat16"
    )


def executing_two_steps():
    return small(steps_per_execution=2)


def overfitting():
    """A model whose learning rate is so high that its validation loss soon rises."""
    return small(keras.optimizers.Adam(0.1))


def with_dropout(metrics=("accuracy",)):
    """A Keras model other than VaultGemma whose training needs random numbers."""
    inputs = {name: keras.Input((6,), dtype="int32", name=name) for name in IDS}
    x = keras.layers.Embedding(32, 8, name="embedding")(inputs["token_ids"])
    x = keras.layers.Dropout(0.5, name="with_a_seed", seed=3)(
        keras.layers.Dropout(0.5, name="without")(x)
    )
    model = keras.Model(inputs, keras.layers.Dense(32, name="head")(x), name="any")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=list(metrics))
    return model


def stateful_callbacks():
    return [
        keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=1),
        keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True),
    ]


def assert_survives(model, folder, interruptions, callbacks=list, **kwargs):
    """Assert that a run interrupted after so many batches each ends like one without interruption."""
    begin = copy_values(state(model))
    keras.utils.set_random_seed(5)
    fit(model, folder / "whole", callbacks=callbacks(), **kwargs)
    end, history = copy_values(state(model)), model.history
    assert any(not np.array_equal(begin[name], end[name]) for name in end)

    assign_values(state(model), begin.items())
    keras.utils.set_random_seed(5)
    for step in interruptions:
        with pytest.raises(InterruptedError):
            fit(model, folder / "broken", callbacks=[*callbacks(), Interrupt(step)], **kwargs)
        forget(model)
    fit(model, folder / "broken", callbacks=callbacks(), **kwargs)
    assert_equal(copy_values(state(model)), end)
    assert model.history.epoch == history.epoch
    assert model.history.history.keys() == history.history.keys()
    for name, values in history.history.items():
        np.testing.assert_allclose(model.history.history[name], values, rtol=TOLERANCE, atol=0)


# Resuming.


@pytest.mark.first_backend
def test_interrupted_in_any_batch(tmp_path):
    """In the first batch of a run, within an epoch and at its end."""
    model = fresh(small)
    assert_survives(model, tmp_path, [1, 3, 2, 3, 4])
    assert model.history.epoch == [0, 1, 2]
    assert int(to_numpy(model.optimizer.iterations)) == 9
    assert model.history.history["loss"][2] < model.history.history["loss"][0]


def test_interrupted_with_lora_and_its_dropout(tmp_path):
    assert_survives(lora(), tmp_path, [5], save_freq=2)


def test_interrupted_with_gradient_accumulation_mixed_precision_and_a_schedule(tmp_path):
    model = accumulating_gradients()
    assert_survives(model, tmp_path, [5], save_freq=1)
    # In each of three epochs two batches together, and the last one alone.
    assert int(to_numpy(model.optimizer.iterations)) == 6


@pytest.mark.skipif(
    keras.config.backend() == "torch", reason="Keras has no `steps_per_execution` on PyTorch"
)
def test_interrupted_with_several_steps_per_execution(tmp_path):
    data = {"x": Batches(), "y": None, "steps_per_epoch": 4}
    assert_survives(executing_two_steps(), tmp_path, [4], save_freq=2, **data)


@pytest.mark.first_backend
def test_interrupted_on_a_dataset(tmp_path):
    assert_survives(fresh(small), tmp_path, [2, 4], x=Batches(), y=None, steps_per_epoch=4)


@pytest.mark.first_backend
def test_interrupted_on_a_dataset_with_workers(tmp_path):
    """To build a loss that the user passed, Keras reads a batch before the first epoch."""

    def model():
        return small(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def run(name, interruptions=()):
        keras.utils.set_random_seed(0)
        trained = model()
        for step in interruptions:
            with pytest.raises(InterruptedError):
                fit(trained, tmp_path / name, WithWorkers(), None, callbacks=[Interrupt(step)])
            forget(trained)
            trained = model()
        fit(trained, tmp_path / name, WithWorkers(), None)
        return copy_values(state(trained))

    assert_equal(run("broken", [2, 4]), run("whole"))


@pytest.mark.first_backend
def test_interrupted_with_dropout_and_metrics(tmp_path):
    assert_survives(with_dropout(), tmp_path, [1, 5])


@pytest.mark.first_backend
def test_interrupted_with_early_stopping(tmp_path):
    model = fresh(overfitting)
    data = {"validation_data": (IDS, LABELS[::-1]), "epochs": 9}
    assert_survives(model, tmp_path, [7], callbacks=stateful_callbacks, save_freq="epoch", **data)
    assert len(model.history.epoch) < 9
    assert float(to_numpy(model.optimizer.learning_rate)) < 0.1


# Killed processes.


@pytest.mark.any_backend
def test_killed(tmp_path):
    """Importing the backend takes most of the time, so that a process forks after it."""
    code = f"import pathlib, runs; runs.run_in_children(pathlib.Path({str(tmp_path)!r}))"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    expected = ["-9 training.state", "-9 training.state training.state.new", "0 training.state"]
    assert result.stdout.splitlines() == expected, result.stderr[-2000:]
    model = fresh(small)
    fit(model, tmp_path / "whole")
    assert_equal(dict(read_state_arrays(tmp_path / "end", *GROUPS)), copy_values(state(model)))


# After the end of a run.


@pytest.mark.first_backend
def test_a_finished_run_is_not_repeated(tmp_path):
    model = fresh(small)
    fit(model, tmp_path / "run", epochs=2)
    end, history = copy_values(state(model)), model.history.history
    forget(model)
    fit(model, tmp_path / "run", epochs=2)
    assert_equal(copy_values(state(model)), end)
    assert model.history.history == history
    fit(model, tmp_path / "run", epochs=3)
    assert model.history.epoch == [0, 1, 2]
    assert int(to_numpy(model.optimizer.iterations)) == 9


@pytest.mark.first_backend
def test_a_run_that_was_stopped_early_remains_stopped(tmp_path):
    model = fresh(overfitting)
    callbacks = [keras.callbacks.EarlyStopping("loss", patience=0, min_delta=100)]
    fit(model, tmp_path / "run", callbacks=callbacks, epochs=5)
    end = copy_values(state(model))
    fit(model, tmp_path / "run", callbacks=callbacks, epochs=5)
    assert model.history.epoch == [0, 1]
    assert_equal(copy_values(state(model)), end)


@pytest.mark.first_backend
def test_resuming_prints_the_position(tmp_path, capsys):
    model = fresh(small)
    with pytest.raises(InterruptedError):
        fit(model, tmp_path / "run", callbacks=[Interrupt(6)], verbose=2)
    fit(model, tmp_path / "run", verbose=2)
    assert (
        f"{tmp_path}/run/training.state: resuming after epoch 2, batch 2" in capsys.readouterr().out
    )


# Invalid checkpoints and folders.


@pytest.mark.first_backend
def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    """Training continues, and the last complete checkpoint remains."""
    model = fresh(small)
    replace, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if len(calls) in (3, 4):
            raise OSError(28, "No space left on device")
        replace(*args)

    monkeypatch.setattr(os, "replace", full)
    with (
        pytest.warns(UserWarning, match="Training continues") as caught,
        pytest.raises(InterruptedError),
    ):
        fit(model, tmp_path / "run", callbacks=[Interrupt(5)])
    assert messages(caught) == [
        f"No checkpoint could be saved after {position}: [Errno 28] No space left on device. "
        "Training continues; the last checkpoint is that after epoch 1, batch 1"
        for position in ("epoch 1, batch 2", "epoch 1")
    ]
    path = tmp_path / "run" / FILE
    assert read_state_metadata(path)["position"] == {
        "epoch": 1,
        "batch": 1,
        "is_finished": False,
    }


@pytest.mark.first_backend
def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        fit(small(), tmp_path / "file" / "run")
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def saved_run(tmp_path):
    """The folder of a run of no steps."""
    folder = tmp_path / "run"
    fit(small(), folder, epochs=0)
    assert os.listdir(folder) == [FILE]
    return folder


@pytest.mark.first_backend
def test_a_truncated_checkpoint_raises(saved_run):
    path = saved_run / FILE
    path.write_bytes(path.read_bytes()[:-100])
    model = small()
    before = copy_values(state(model))
    with pytest.raises(
        ValueError, match=r"training\.state is truncated or damaged \(.*\)\. Delete it"
    ):
        fit(model, saved_run)
    assert_equal(copy_values(state(model)), before)


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "make, data, message",
    [
        (
            lambda: small(num_layers=2),
            {},
            "its model had decoder_block_1/attention_norm/scale = None",
        ),
        (lambda: small("sgd"), {}, "its model had optimizer = Adam. Received: SGD"),
        (
            lora,
            {},
            "its model had decoder_block_0/attention/query/lora_kernel_a = None. Received: float32 \\[16, 2\\]",
        ),
        (small, {"batch_size": 5}, "its data had batch_size = 4. Received: 5"),
        (small, {"y": LABELS[::-1]}, "its data had SHA-256 = "),
        (small, {"shuffle": False}, "its data had shuffle = True. Received: False"),
        (small, {"x": Batches(), "y": None}, "its data had items = 10. Received: 5"),
    ],
)
def test_a_checkpoint_of_another_run_raises(saved_run, make, data, message):
    with pytest.raises(ValueError, match=rf"training\.state belongs to another run: {message}"):
        fit(make(), saved_run, **data)


@pytest.mark.first_backend
def test_other_metrics_raise(tmp_path):
    with pytest.raises(InterruptedError):
        fit(with_dropout(), tmp_path, callbacks=[Interrupt(2)])
    with pytest.raises(ValueError, match="its model had 4 variables of metrics. Received: 2"):
        fit(with_dropout(metrics=[]), tmp_path)


@pytest.mark.first_backend
@pytest.mark.parametrize("save_freq", [0, -1, 2.5, True, "batch", None])
def test_save_freq_out_of_range_raises(save_freq):
    with pytest.raises(
        ValueError,
        match=f"`save_freq` must be 'epoch' or a positive integer. Received: save_freq={save_freq!r}",
    ):
        TrainingCheckpoint("run", save_freq)


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"x": iter([IDS]), "y": None},
            "`x` must be strings, arrays or .* which can be read at any position. Received: x of type",
        ),
        (
            {"validation_split": 0.5},
            "`validation_split` must be None .*; use `validation_data`. Received: validation_split=0.5",
        ),
        (
            {"callbacks": [TrainingCheckpoint("another")]},
            "`callbacks` must contain at most one TrainingCheckpoint. Received: 2",
        ),
    ],
)
def test_runs_that_cannot_be_resumed_raise(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(small(), tmp_path / "run", **arguments)


@pytest.mark.first_backend
def test_only_fit_of_this_package_accepts_it(tmp_path):
    with pytest.raises(ValueError, match="of `VaultGemmaCausalLM.fit`"):
        keras.Model.fit(small(), IDS, LABELS, callbacks=[TrainingCheckpoint(tmp_path)], verbose=0)


# Runs without interruption.


def trained_by(optimizer, rows, batch_size):
    keras.utils.set_random_seed(0)
    model = small(optimizer)
    x, y = {name: array[:rows] for name, array in IDS.items()}, LABELS[:rows]
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    return model


@pytest.fixture(scope="module")
def two_steps():
    """The weights after two steps of four rows each."""
    return copy_values(state(trained_by(keras.optimizers.SGD(0.5), 8, 4)))


def test_accumulated_gradients_are_those_of_a_larger_batch(two_steps):
    model = trained_by(keras.optimizers.SGD(0.5, gradient_accumulation_steps=2), 8, 2)
    assert int(to_numpy(model.optimizer.iterations)) == 2
    for i, v in enumerate(model.trainable_variables):
        np.testing.assert_allclose(to_numpy(v), two_steps[f"weight/{i}"], atol=1e-6)


def test_a_schedule_sets_the_learning_rate_of_each_step(two_steps):
    """The last of three steps has a learning rate of zero."""
    model = trained_by(
        keras.optimizers.SGD(keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.0])),
        10,
        4,
    )
    assert int(to_numpy(model.optimizer.iterations)) == 3
    for i, v in enumerate(model.trainable_variables):
        np.testing.assert_allclose(to_numpy(v), two_steps[f"weight/{i}"], atol=1e-6)


@pytest.mark.first_backend
def test_early_stopping_restores_the_best_weights():
    model = fresh(overfitting)
    data = (IDS, LABELS[::-1])
    history = model.fit(
        IDS,
        LABELS,
        epochs=9,
        batch_size=4,
        validation_data=data,
        callbacks=stateful_callbacks(),
        verbose=0,
    )
    losses = history.history["val_loss"]
    assert np.argmin(losses) == len(losses) - 3 < 6  # a patience of two
    np.testing.assert_allclose(
        model.evaluate(*data, batch_size=4, verbose=0, return_dict=True)["loss"],
        min(losses),
        rtol=1e-5,
    )
