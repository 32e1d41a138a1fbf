"""What a checkpoint compares before it goes on, and averages that survive an interruption."""

import keras
import numpy as np
import pytest
from common import to_numpy
from runs import IDS, LABELS, Batches, Interrupt, assert_equal, fit, small, state

from keras_vaultgemma import PackedDataset
from keras_vaultgemma.training.state import assign_values, copy_values


def interrupted(model, folder, **arguments):
    with pytest.raises(InterruptedError):
        fit(model, folder, callbacks=[Interrupt(2)], **arguments)


DOCUMENTS = ["The fox did not want the grapes.", "The tortoise won.", "The hare slept."] * 4


@pytest.mark.first_backend
def test_other_documents_in_a_packed_dataset(tiny, tmp_path):
    model = small(vocabulary_size=4096)

    def packed(documents):
        return PackedDataset(documents, tiny.preprocessor, batch_size=2, sequence_length=8)

    others = [*DOCUMENTS[:5], DOCUMENTS[5][::-1], *DOCUMENTS[6:]]
    assert len(packed(others)) == len(packed(DOCUMENTS))
    interrupted(model, tmp_path, x=packed(DOCUMENTS), y=None, batch_size=None)
    with pytest.raises(ValueError, match="its data had SHA-256 of the packed rows = "):
        fit(model, tmp_path, x=packed(others), y=None, batch_size=None)
    fit(model, tmp_path, x=packed(DOCUMENTS), y=None, batch_size=None)


class OtherBatches(Batches):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, y[::-1]


@pytest.mark.first_backend
def test_other_batches_of_a_dataset(tmp_path):
    model = small()
    interrupted(model, tmp_path, x=Batches(), y=None)
    with pytest.raises(ValueError, match="its data had SHA-256 = "):
        fit(model, tmp_path, x=OtherBatches(), y=None)
    fit(model, tmp_path, x=Batches(), y=None)


def cosine(steps):
    return keras.optimizers.schedules.CosineDecay(0.01, steps)


CHANGES = {
    "beta_1 = 0.9. Received: 0.5": [{}, dict(beta_1=0.5)],
    "weight_decay = None. Received: 0.1": [{}, dict(weight_decay=0.1)],
    "learning_rate = 0.001.*. Received: 0.002": [{}, dict(learning_rate=0.002)],
    "learning_rate = .*'decay_steps': 9.* Received: .*'decay_steps': 90": [
        dict(learning_rate=cosine(9)),
        dict(learning_rate=cosine(90)),
    ],
    "clipnorm = None. Received: 1.0": [{}, dict(clipnorm=1.0)],
}


@pytest.mark.first_backend
@pytest.mark.parametrize("message", CHANGES)
def test_other_constants_of_the_optimizer(message, tmp_path):
    first, second = CHANGES[message]
    interrupted(small(keras.optimizers.Adam(**first)), tmp_path)
    with pytest.raises(
        ValueError, match=f"(?s)belongs to another run: its optimizer had {message}"
    ):
        fit(small(keras.optimizers.Adam(**second)), tmp_path)


@pytest.mark.first_backend
def test_a_learning_rate_that_a_callback_changed(tmp_path):
    """Both a new process, with the first rate, and another call in this one go on."""
    plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=100.0)
    model = small()
    fit(model, tmp_path, callbacks=[plateau])
    assert float(to_numpy(model.optimizer.learning_rate)) < 0.001
    for again, epochs in ((model, 4), (small(), 5)):
        plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=100.0)
        assert fit(again, tmp_path, callbacks=[plateau], epochs=epochs).position["epoch"] == epochs


@pytest.mark.first_backend
def test_another_alpha_or_dropout(tmp_path):
    def adapted(**options):
        keras.utils.set_random_seed(0)
        model = small()
        model.backbone.enable_lora(2, **{"dropout": 0.1, **options})
        model.compile("adam")
        return model

    interrupted(adapted(), tmp_path)
    for options, message in (
        (dict(alpha=8), r"alpha = \[2.0\]. Received: \[8.0\]"),
        (dict(dropout=0.2), r"dropout = \[0.1\]. Received: \[0.2\]"),
    ):
        with pytest.raises(ValueError, match=f"its adapter had {message}"):
            fit(adapted(**options), tmp_path)
    fit(adapted(), tmp_path)


@pytest.mark.parametrize(
    "swap_on_epoch", [True, pytest.param(False, marks=pytest.mark.first_backend)]
)
def test_averaged_weights_survive_an_interruption(swap_on_epoch, tmp_path):
    """Between epochs the model has the average, and the optimizer the weights to go on with."""

    def run(name, step=None):
        model.compile(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5))
        assign_values(state(model), begin.items())
        keras.utils.set_random_seed(1)
        callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch)]
        options = dict(validation_data=(IDS, LABELS), save_freq="epoch")
        if step is not None:
            with pytest.raises(InterruptedError):
                fit(model, tmp_path / name, callbacks=[*callbacks, Interrupt(step)], **options)
            model.compile(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5))
            callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch)]
        fit(model, tmp_path / name, callbacks=callbacks, **options)
        return copy_values(state(model)), model.history.history

    model = small(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5))
    begin = copy_values(state(model))
    end, history = run("whole")
    found, resumed = run("broken", step=4)
    assert any(not np.array_equal(begin[name], end[name]) for name in end)
    assert_equal(found, end)
    for name, values in history.items():
        np.testing.assert_allclose(resumed[name], values, rtol=1e-6)
