"""What a run does when a loss or a weight is not finite. test_checkpoint.py has the runs that are interrupted."""

import keras
import numpy as np
import pytest
from runs import IDS, LABELS, assert_equal, fit, forget, fresh, messages, small, state

from keras_vaultgemma.training import checkpointed_run
from keras_vaultgemma.training.checkpoint import FILE
from keras_vaultgemma.training.checkpointed_run import COPY_LIMIT
from keras_vaultgemma.training.state import copy_values, read_state_arrays, read_state_facts


def bad_loss(labels, logits):
    """Not a number for a row that begins with label 2."""
    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return losses + keras.ops.where(labels[:, :1] == 2, np.nan, 0.0)


def with_bad_loss():
    return small(loss=bad_loss)


BAD_LABELS = LABELS.copy()
BAD_LABELS[6, 0] = 2


def after(steps, folder):
    """The state after so many steps, each with one row in order."""
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
            " (by this batch, or by the update after the one before)",
            "after epoch 1, batch 4, the last checkpoint",
        ),
    ],
)
def test_a_loss_that_is_not_a_number(tmp_path, monkeypatch, limit, restored, since, words):
    """Training stops with the batch that is to blame, and the state before it comes back; where it is large, a saved
    one. Only that is on disk, so that the run may be gone on with."""
    expected = after(restored, tmp_path / "good")
    monkeypatch.setattr(checkpointed_run, "COPY_LIMIT", limit)
    model = fresh(with_bad_loss)
    options = {"batch_size": 1, "shuffle": False, "save_freq": 4, "validation_data": (IDS, LABELS)}
    for _ in range(2):
        with pytest.warns(UserWarning, match="Training stops") as caught:
            checkpoint = fit(model, tmp_path / "run", y=BAD_LABELS, **options)
        assert messages(caught) == [checkpoint.failure]
        assert checkpoint.failure == (
            f"Epoch 1, batch 7 of 10 (rows [6] of the data): the loss is nan{since}. Training stops; weights and "
            f"optimizer are again as they were {words}"
        )
        assert_equal(copy_values(state(model)), expected)
        assert model.history.epoch == [0] and np.isfinite(model.history.history["val_loss"]).all()
        assert read_state_facts(checkpoint.path)["position"] == {
            "epoch": 0,
            "batch": 4,
            "is_finished": False,
        }
        forget(model)
    assert (
        fit(model, tmp_path / "other", {k: v[:4] for k, v in IDS.items()}, LABELS[:4]).failure
        is None
    )


@pytest.mark.parametrize("limit", [COPY_LIMIT, 0])
def test_weights_that_are_not_finite_are_neither_kept_nor_saved(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(checkpointed_run, "COPY_LIMIT", limit)
    model = small(keras.optimizers.SGD(np.inf))
    begin = copy_values(state(model))
    with pytest.warns(
        UserWarning, match="Epoch 1, batch 1 of 3 .*: it leaves weights that are not finite"
    ):
        fit(model, tmp_path / "run")
    assert_equal(copy_values(state(model)), begin)
    assert_equal(dict(read_state_arrays(tmp_path / "run" / FILE, "weight", "optimizer")), begin)


@pytest.mark.parametrize("limit, batch, since", [(COPY_LIMIT, 1, False), (0, 2, True)])
def test_weights_that_one_batch_spoils_and_the_next_one_meets(
    tmp_path, monkeypatch, limit, batch, since
):
    """Where no step is looked at, it is the next loss that tells, and the batch of that one may be innocent."""
    monkeypatch.setattr(checkpointed_run, "COPY_LIMIT", limit)
    model = small(keras.optimizers.SGD(np.inf))
    with pytest.warns(UserWarning, match=f"Epoch 1, batch {batch} of 3") as caught:
        checkpoint = fit(model, tmp_path / "run", save_freq=3)
    assert messages(caught) == [checkpoint.failure]
    assert (
        "the loss is nan (by this batch, or by the update after the one before)"
        in checkpoint.failure
    ) == since


def test_a_save_that_finds_weights_of_several_batches_spoiled(tmp_path, monkeypatch):
    """The loss of the rows after the first is 0, whatever the weights are."""
    monkeypatch.setattr(checkpointed_run, "COPY_LIMIT", 0)
    model = small(
        loss=lambda labels, logits: keras.ops.where(labels == 2, 0.0, keras.ops.sum(logits, -1))
    )
    model.optimizer.learning_rate.assign(np.inf)
    labels = LABELS * 0 + 2
    labels[0] = 3
    with pytest.warns(
        UserWarning,
        match="batch 3 of 3 .*: it or one of the 2 before leaves weights that are not finite",
    ):
        fit(model, tmp_path / "run", y=labels, save_freq=3, shuffle=False)
