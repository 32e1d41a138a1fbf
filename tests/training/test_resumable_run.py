"""Runs in which a loss or a weight becomes NaN or infinite."""

import keras
import numpy as np
import pytest
from runs import IDS, LABELS, assert_equal, fit, forget, fresh, messages, small, state

from keras_vaultgemma.training import resumable_run
from keras_vaultgemma.training.checkpoint import FILE
from keras_vaultgemma.training.resumable_run import COPY_LIMIT
from keras_vaultgemma.training.state import copy_values, read_state_arrays, read_state_metadata


def bad_loss(labels, logits):
    """NaN for a row whose first label is 2."""
    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return losses + keras.ops.where(labels[:, :1] == 2, np.nan, 0.0)


def with_bad_loss():
    return small(loss=bad_loss)


BAD_LABELS = LABELS.copy()
BAD_LABELS[6, 0] = 2


def state_after(steps, folder):
    """Return the state after so many steps of one row each, in order."""
    model = fresh(with_bad_loss)
    x, y = {name: array[:steps] for name, array in IDS.items()}, LABELS[:steps]
    fit(model, folder, x, y, epochs=1, batch_size=1, shuffle=False)
    return copy_values(state(model))


@pytest.mark.parametrize(
    "limit, restored, since, words",
    [
        (COPY_LIMIT, 6, "", "before it"),
        (
            0,
            4,
            " (because of this batch, or of the update after the previous one)",
            "after epoch 1, batch 4, the last checkpoint",
        ),
    ],
)
def test_a_loss_that_is_nan_stops_training(tmp_path, monkeypatch, limit, restored, since, words):
    """The state before the batch is restored, or the saved one if the state is too large to copy.

    Only finite states are saved, so that the run can be resumed.
    """
    expected = state_after(restored, tmp_path / "good")
    monkeypatch.setattr(resumable_run, "COPY_LIMIT", limit)
    model = fresh(with_bad_loss)
    options = {"batch_size": 1, "shuffle": False, "save_freq": 4, "validation_data": (IDS, LABELS)}
    for _ in range(2):
        with pytest.warns(UserWarning, match="Training stops") as caught:
            checkpoint = fit(model, tmp_path / "run", y=BAD_LABELS, **options)
        assert messages(caught) == [checkpoint.failure]
        assert checkpoint.failure == (
            f"Epoch 1, batch 7 of 10 (rows [6] of the data): the loss is nan{since}. Training stops; weights and "
            f"optimizer are restored to their state {words}"
        )
        assert_equal(copy_values(state(model)), expected)
        assert model.history.epoch == [0] and np.isfinite(model.history.history["val_loss"]).all()
        assert read_state_metadata(checkpoint.path)["position"] == {
            "epoch": 0,
            "batch": 4,
            "is_finished": False,
        }
        forget(model)
    assert (
        fit(model, tmp_path / "other", {k: v[:4] for k, v in IDS.items()}, LABELS[:4]).failure
        is None
    )


@pytest.mark.first_backend
@pytest.mark.parametrize("limit", [COPY_LIMIT, 0])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(resumable_run, "COPY_LIMIT", limit)
    model = small(keras.optimizers.SGD(np.inf))
    begin = copy_values(state(model))
    with pytest.warns(
        UserWarning, match="Epoch 1, batch 1 of 3 .*: weights are not finite after it"
    ):
        fit(model, tmp_path / "run")
    assert_equal(copy_values(state(model)), begin)
    assert_equal(dict(read_state_arrays(tmp_path / "run" / FILE, "weight", "optimizer")), begin)


@pytest.mark.parametrize("limit, batch, since", [(COPY_LIMIT, 1, False), (0, 2, True)])
def test_a_loss_that_is_nan_because_of_the_previous_update(
    tmp_path, monkeypatch, limit, batch, since
):
    """If the weights are not checked after each step, the next loss is the first sign."""
    monkeypatch.setattr(resumable_run, "COPY_LIMIT", limit)
    model = small(keras.optimizers.SGD(np.inf))
    with pytest.warns(UserWarning, match=f"Epoch 1, batch {batch} of 3") as caught:
        checkpoint = fit(model, tmp_path / "run", save_freq=3)
    assert messages(caught) == [checkpoint.failure]
    assert (
        "the loss is nan (because of this batch, or of the update after the previous one)"
        in checkpoint.failure
    ) == since


@pytest.mark.first_backend
def test_a_save_that_finds_weights_that_are_not_finite(tmp_path, monkeypatch):
    """The loss is 0 for all rows after the first, whatever the weights are."""
    monkeypatch.setattr(resumable_run, "COPY_LIMIT", 0)
    model = small(
        loss=lambda labels, logits: keras.ops.where(labels == 2, 0.0, keras.ops.sum(logits, -1))
    )
    model.optimizer.learning_rate.assign(np.inf)
    labels = LABELS * 0 + 2
    labels[0] = 3
    with pytest.warns(
        UserWarning,
        match="batch 3 of 3 .*: weights are not finite after it or one of the 2 batches before it",
    ):
        fit(model, tmp_path / "run", y=labels, save_freq=3, shuffle=False)
