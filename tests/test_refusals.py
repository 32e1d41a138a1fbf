"""Each refusal, through `compile` and `fit` as users meet it, with its one sentence."""

import keras
import numpy as np
import pytest
from common import random_backbone
from test_mechanism import SMALL

from keras_vaultgemma import VaultGemmaCausalLM, packing, privacy
from keras_vaultgemma.privacy.training import PrivateTraining

pytestmark = pytest.mark.usefixtures("own_key")

ROWS = 40


class Private(PrivateTraining, keras.Model):
    """Any Keras model."""


def dense(*layers):
    inputs = keras.Input((3,))
    x = inputs
    for layer in [*layers, keras.layers.Dense(2)]:
        x = layer(x)
    return Private(inputs, x)


def dpsgd(**changes):
    return privacy.DPSGD(**{"noise_multiplier": 1.0, "delta": 1e-4, **changes})


def fitted(model=None, loss="mse", dpsgd_arguments=None, data=None, **arguments):
    model = model or dense()
    model.compile(keras.optimizers.SGD(0.1), loss, privacy=dpsgd(**(dpsgd_arguments or {})))
    x, y = data or (np.ones((ROWS, 3), "float32"), np.ones((ROWS, 2), "float32"))
    return model.fit(x, y, **{"batch_size": 8, "verbose": 0, **arguments})


def test_nothing_is_refused_here():
    history = fitted().history
    assert set(history) == {"unprotected_loss", "unprotected_clipped_share", "unprotected_not_finite_rows", "epsilon"}


OPTIMIZERS = {
    "gradient_accumulation_steps=4": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=4),
    "LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    "Received: SGD": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
}


@pytest.mark.parametrize("message", OPTIMIZERS)
def test_optimizers(message):
    with pytest.raises(ValueError, match=message):
        dense().compile(OPTIMIZERS[message](), "mse", privacy=dpsgd())


def test_float16():
    with pytest.raises(ValueError, match="float16 do not give: use float32 or mixed_bfloat16. Received: .* in float16"):
        dense(keras.layers.Dense(2, dtype="mixed_float16")).compile("sgd", "mse", privacy=dpsgd())


def test_several_steps_at_once():
    with pytest.raises(ValueError, match="`steps_per_execution=1`.* Received: steps_per_execution=2"):
        dense().compile("sgd", "mse", privacy=dpsgd(), steps_per_execution=2)


def test_batch_normalization():
    with pytest.raises(ValueError, match="BatchNormalization mixes the rows of a batch and keeps their mean"):
        dense(keras.layers.BatchNormalization()).compile("sgd", "mse", privacy=dpsgd())


class Remembers(keras.layers.Layer):
    def build(self, input_shape):
        self.mean = self.add_weight(shape=(3,), initializer="zeros", trainable=False, name="mean")

    def call(self, x, training=None):
        if training:
            self.mean.assign(keras.ops.mean(x, axis=0))
        return x


def test_layers_that_remember():
    with pytest.raises(ValueError, match="layers that remember nothing of the rows. Received: .*mean"):
        fitted(dense(Remembers()))


@pytest.mark.parametrize("kind", ["metrics", "weighted_metrics"])
@pytest.mark.parametrize("metric", ["mae", keras.metrics.MeanAbsoluteError(name="error")])
def test_metrics_without_the_mark(kind, metric):
    with pytest.raises(
        ValueError, match="not covered by the guarantee, and their names must begin with 'unprotected_'"
    ):
        dense().compile("sgd", "mse", privacy=dpsgd(), **{kind: [metric]})


def test_metrics_with_the_mark_are_told():
    model = dense()
    metric = keras.metrics.MeanAbsoluteError(name="unprotected_error")
    model.compile(keras.optimizers.SGD(0.0), "mse", privacy=dpsgd(), metrics=[metric])
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    y = np.asarray(keras.ops.convert_to_numpy(model(x))) + 2.0
    history = model.fit(x, y, batch_size=ROWS, verbose=0).history
    np.testing.assert_allclose(history["unprotected_error"], [2.0], rtol=1e-5)
    np.testing.assert_allclose(history["unprotected_loss"], [4.0], rtol=1e-5)


@pytest.mark.parametrize(
    "argument", [dict(shuffle=True), dict(steps_per_epoch=3), dict(class_weight={0: 1.0}), dict(validation_split=0.1)]
)
def test_arguments_of_fit(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"Private training takes no `{name}`: .* Received: {name}="):
        fitted(**argument)


def test_validation_that_nobody_called_public():
    data = (np.ones((4, 3), "float32"), np.ones((4, 2), "float32"))
    with pytest.raises(ValueError, match=r"say `DPSGD\(public_validation=True\)` where the rows are public"):
        fitted(validation_data=data)
    history = fitted(validation_data=data, dpsgd_arguments=dict(public_validation=True)).history
    assert len(history["val_loss"]) == 1 and "val_unprotected_loss" not in history


@pytest.mark.parametrize("kind", [keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore])
def test_weights_saved_without_their_ledger(kind, tmp_path):
    with pytest.raises(
        ValueError, match=f"must come with their ledger: use `TrainingCheckpoint`. Received: {kind.__name__}"
    ):
        fitted(callbacks=[kind(str(tmp_path / "weights.weights.h5"))])


@pytest.mark.parametrize("kind", [keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau])
def test_decisions_by_unprotected_metrics(kind):
    with pytest.raises(ValueError, match=f"no noise protects: .* Received: {kind.__name__} of 'unprotected_loss'"):
        fitted(callbacks=[kind(monitor="unprotected_loss")])


def test_a_batch_of_the_users_own():
    model = dense()
    model.compile("sgd", "mse", privacy=dpsgd())
    with pytest.raises(ValueError, match="draws its batches itself, in `fit`"):
        model.train_on_batch(np.ones((2, 3)), np.ones((2, 2)))


@pytest.mark.parametrize("weight", [1.5, -0.5])
def test_sample_weights_beyond_one(weight):
    with pytest.raises(ValueError, match="`sample_weight` must be from 0 to 1 in private training"):
        fitted(sample_weight=np.array([weight, *[0.5] * (ROWS - 1)]))


def contrast(y, predicted):
    """Each prediction against the mean of the batch: a number for each row, and none of a row's own."""
    return keras.ops.mean((predicted - keras.ops.mean(predicted, axis=0)) ** 2 + y, axis=-1)


@pytest.mark.parametrize("loss", [contrast, lambda y, p: keras.ops.mean((y - p) ** 2)], ids=["contrast", "mean"])
def test_losses_that_mix_rows(loss):
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    with pytest.raises(ValueError, match="a loss of which each row has its own"):
        fitted(loss=loss, data=(x, np.ones((ROWS, 2), "float32")))


@pytest.mark.parametrize("loss", ["mse", keras.losses.Huber(), keras.losses.mean_absolute_error])
def test_losses_that_do_not(loss):
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    assert np.isfinite(fitted(loss=loss, data=(x, np.ones((ROWS, 2), "float32"))).history["unprotected_loss"][0])


def test_regularizers():
    with pytest.raises(ValueError, match="regularizers and `add_loss` are none: use the optimizer's `weight_decay`"):
        fitted(dense(keras.layers.Dense(2, kernel_regularizer="l2")))


def language_model(**changes):
    model = VaultGemmaCausalLM(random_backbone(**SMALL), **changes)
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd())
    return model


def test_data_that_cannot_be_drawn_by_row():
    ids = {"token_ids": np.ones((8, 5), "int32"), "padding_mask": np.ones((8, 5), "int32")}
    with pytest.raises(ValueError, match="draws its rows one by one"):
        language_model().fit(batch for batch in [(ids, ids["token_ids"])])


def packed(count):
    mask = np.repeat(np.arange(1, count + 1), 4)[None].repeat(ROWS, 0).astype("int32")
    return {"token_ids": np.ones_like(mask), "padding_mask": mask}


def test_packed_rows():
    x, model = packed(3), language_model()
    with pytest.raises(ValueError, match=r'say `DPSGD\(unit="sequence"\)`.* Received: 3 documents in a row'):
        model.fit(x, x["token_ids"], batch_size=8, verbose=0)
    model.fit(packed(1), packed(1)["token_ids"], batch_size=8, verbose=0)
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd(unit="sequence"))
    model.fit(x, x["token_ids"], batch_size=8, verbose=0)
    assert model.privacy.spent().unit == "one sequence of at most 12 tokens"


def test_a_packed_dataset(tiny):
    data = packing.PackedDataset(["The fox said so."] * 30, tiny.preprocessor, batch_size=2, sequence_length=32)
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd())
    with pytest.raises(ValueError, match="documents in a row"):
        model.fit(data, verbose=0)


def test_16_bit_weights():
    model = VaultGemmaCausalLM(random_backbone(**SMALL, dtype="bfloat16"))
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd())
    with pytest.raises(ValueError, match="`fit` needs float32 weights to train"):
        model.fit(packed(1), packed(1)["token_ids"], verbose=0)


def test_a_distribution(monkeypatch):
    class Distribution:
        pass

    monkeypatch.setattr(keras.distribution, "distribution", Distribution)
    with pytest.raises(ValueError, match="runs on one device, where each row is clipped and counted once"):
        fitted()
