"""Everything that private training rejects, in `compile` and `fit`, with its message."""

import contextlib

import keras
import numpy as np
import pytest
from common import random_backbone
from privacy_cases import SMALL

from keras_vaultgemma import TrainingCheckpoint, VaultGemmaCausalLM, backend, privacy
from keras_vaultgemma.data import packing
from keras_vaultgemma.models.trainer import Trainer
from keras_vaultgemma.privacy import checks, mechanism
from keras_vaultgemma.privacy.row_losses import RowLosses
from keras_vaultgemma.privacy.train_step import PrivateTraining

pytestmark = pytest.mark.first_backend

ROWS = 40


class Private(Trainer, keras.Model):
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


@pytest.mark.every_backend
def test_a_private_fit_reports_unprotected_metrics_and_epsilon():
    history = fitted().history
    assert set(history) == {
        "unprotected_loss",
        "unprotected_clipped_share",
        "unprotected_not_finite_rows",
        "epsilon",
    }


OPTIMIZERS = {
    "gradient_accumulation_steps=4": lambda: keras.optimizers.SGD(
        0.1, gradient_accumulation_steps=4
    ),
    "LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    "Received: SGD": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
}


@pytest.mark.parametrize("message", OPTIMIZERS)
def test_optimizers(message):
    with pytest.raises(ValueError, match=message):
        dense().compile(OPTIMIZERS[message](), "mse", privacy=dpsgd())


@pytest.mark.every_backend
def test_float16():
    with pytest.raises(
        ValueError,
        match="nor float16: use float32 or mixed_bfloat16. Received: .* in float16",
    ):
        dense(keras.layers.Dense(2, dtype="mixed_float16")).compile("sgd", "mse", privacy=dpsgd())


@pytest.mark.every_backend
def test_several_steps_at_once():
    with pytest.raises(
        ValueError, match="`steps_per_execution=1`.* Received: steps_per_execution=2"
    ):
        dense().compile("sgd", "mse", privacy=dpsgd(), steps_per_execution=2)


SET_LATER = {
    "steps_per_execution=4": lambda model: setattr(model, "steps_per_execution", 4),
    "gradient_accumulation_steps=4": lambda model: setattr(
        model.optimizer, "gradient_accumulation_steps", 4
    ),
    "LossScaleOptimizer": lambda model: setattr(
        model, "optimizer", keras.optimizers.LossScaleOptimizer(model.optimizer)
    ),
}


@pytest.mark.parametrize("message", SET_LATER)
def test_what_is_set_after_compile(message):
    model = dense()
    model.compile(keras.optimizers.SGD(0.1), "mse", privacy=dpsgd())
    SET_LATER[message](model)
    with pytest.raises(ValueError, match=f"Received: {message}"):
        model.fit(np.ones((ROWS, 3)), np.ones((ROWS, 2)), batch_size=8, verbose=0)
    assert not model.privacy.ledger.runs


class TwoUpdates(Private):
    """A step that updates the weights twice, and would be counted once."""

    def train_step(self, *args):
        if backend.NAME != "jax":
            super().train_step(*args)
            return super().train_step(*args)
        state, data = args
        return super().train_step(super().train_step(state, data)[1], data)


@pytest.mark.every_backend
def test_updates_that_are_not_steps():
    inputs = keras.Input((3,))
    model = TwoUpdates(inputs, keras.layers.Dense(2)(inputs))
    with pytest.raises(RuntimeError, match="Received: 10 updates in 5 steps"):
        fitted(model)
    assert model.privacy.spent().steps == 10


class Wrapper(keras.callbacks.Callback):
    def __init__(self, callback):
        super().__init__()
        self.parts = {"inner": [callback]}


HIDDEN = {
    "list": lambda callback: keras.callbacks.CallbackList([callback]),
    "list in a list": lambda callback: [
        keras.callbacks.CallbackList([keras.callbacks.CallbackList([callback])])
    ],
    "attribute": Wrapper,
    "attribute of an attribute": lambda callback: [Wrapper(Wrapper(callback))],
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_callbacks_inside_others(hidden):
    for callback, message in (
        (keras.callbacks.ModelCheckpoint("x.keras"), "Received: ModelCheckpoint"),
        (keras.callbacks.EarlyStopping("unprotected_loss"), "Received: EarlyStopping"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(callbacks=HIDDEN[hidden](callback))


def test_callbacks_of_a_list_are_called():
    seen = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs))
    fitted(callbacks=keras.callbacks.CallbackList([callback]))
    assert len(seen) == 1 and "epsilon" in seen[0]


@pytest.mark.parametrize("clip_norm", [0, 1e-22, 1e-9, 1e9, float("nan")])
@pytest.mark.any_backend
def test_clipping_norms_whose_squares_underflow(clip_norm):
    with pytest.raises(ValueError, match="`clip_norm` must be .* Received: clip_norm="):
        dpsgd(clip_norm=clip_norm)


def test_batch_normalization():
    with pytest.raises(
        ValueError, match="BatchNormalization mixes the rows of a batch and stores their mean"
    ):
        dense(keras.layers.BatchNormalization()).compile("sgd", "mse", privacy=dpsgd())


SEVERAL_ROWS = (
    "`microbatch_size` must be 1 or None unless .* gradient of each .* Received: microbatch_size=4"
)


@pytest.mark.parametrize("shape", [(3,), (4, 3)])
def test_several_rows_with_layers_that_would_mix_them(shape):
    """Kernels of shape [4, 3, 2] would broadcast against rows of shape [4, 3] and [4, 4, 3] without an error."""
    inputs = keras.Input(shape)
    model = Private(inputs, keras.layers.Dense(2)(inputs))
    data = (np.ones((ROWS, *shape), "float32"), np.ones((ROWS, *shape[:-1], 2), "float32"))
    with pytest.raises(ValueError, match=SEVERAL_ROWS):
        fitted(model, data=data, dpsgd_arguments=dict(microbatch_size=4))
    fitted(model, data=data, dpsgd_arguments=dict(microbatch_size=1))


OWN = {
    "loss": lambda: dict(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
    "metric": lambda: dict(
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="unprotected_accuracy")]
    ),
}


@pytest.mark.parametrize("own", OWN)
def test_several_rows_with_a_custom_loss_or_metric(own):
    """They return one number for all rows of a microbatch."""
    model = VaultGemmaCausalLM(random_backbone(**SMALL))
    model.backbone.enable_lora(2)
    x = packed(1)
    for arguments, size in ((OWN[own](), 4), (OWN[own](), 1), ({}, 4)):
        model.compile(
            keras.optimizers.SGD(0.1),
            privacy=dpsgd(microbatch_size=size, extend_budget=True),
            **arguments,
        )
        if size > 1 and arguments:
            with pytest.raises(ValueError, match=SEVERAL_ROWS):
                model.fit(x, x["token_ids"], batch_size=8, verbose=0)
        else:
            model.fit(x, x["token_ids"], batch_size=8, verbose=0)


def test_several_rows_with_an_adapter_of_the_embedding():
    model = language_model()
    model.backbone.enable_lora(2, ["query", "token_embedding"])
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd(microbatch_size=4))
    with pytest.raises(ValueError, match=SEVERAL_ROWS):
        model.fit(packed(1), packed(1)["token_ids"], batch_size=8, verbose=0)


class Several(Trainer, keras.Model):
    """A model whose one layer multiplies each row by the row's own copy of the variable."""

    def __init__(self):
        super().__init__()
        self.kernel = self.add_weight(shape=(3,), initializer="ones", name="kernel")

    def call(self, x):
        return keras.ops.sum(x * self.kernel, axis=-1, keepdims=True)

    def _make_private_training(self, settings):
        return PrivateTraining(self, settings, SeveralRowLosses(self))


class SeveralRowLosses(RowLosses):
    takes_row_variables = True

    def losses(self, x, y=None, sample_weight=None):
        losses = keras.ops.mean((self.model(x) - y) ** 2, axis=-1)
        return keras.ops.sum(losses), losses


@pytest.mark.every_backend
def test_several_rows_of_a_model_that_supports_them(monkeypatch):
    monkeypatch.setattr(
        mechanism, "sum_rounding", lambda *sizes: 0.0
    )  # ρ depends on the microbatch
    found = []
    for size in (1, 4):
        model, rng = Several(), np.random.default_rng(0)
        data = (
            rng.normal(size=(ROWS, 3)).astype("float32"),
            rng.normal(size=(ROWS, 1)).astype("float32"),
        )
        with pytest.warns(privacy.NotPrivateWarning):
            fitted(
                model,
                data=data,
                batch_size=ROWS,
                dpsgd_arguments=dict(microbatch_size=size, seed_for_tests=1),
            )
        found.append(keras.ops.convert_to_numpy(model.kernel))
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize("kind", ["a generic model", "VaultGemma"])
@pytest.mark.parametrize("before", ["nothing", "a compile without privacy"])
def test_nothing_is_trained_after_a_rejected_compile(kind, before):
    model = dense() if kind == "a generic model" else VaultGemmaCausalLM(random_backbone(**SMALL))
    loss = dict(loss="mse") if kind == "a generic model" else {}
    x, y = (
        (np.ones((ROWS, 3), "float32"), np.ones((ROWS, 2), "float32"))
        if loss
        else (packed(1), np.ones((ROWS, 4)))
    )
    if before != "nothing":
        model.compile(keras.optimizers.SGD(0.1), **loss)
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
        model.compile(optimizer, privacy=dpsgd(), **loss)
    weights = [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]
    with pytest.raises(ValueError, match=r"You must call `compile\(\)` before"):
        model.fit(x, y, batch_size=8, verbose=0)
    for old, v in zip(weights, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(v))
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd(), **loss)
    model.fit(x, y, batch_size=8, verbose=0)
    assert model.privacy.spent().steps == 5


class Remembers(keras.layers.Layer):
    def build(self, input_shape):
        self.mean = self.add_weight(shape=(3,), initializer="zeros", trainable=False, name="mean")

    def call(self, x, training=None):
        if training:
            self.mean.assign(keras.ops.mean(x, axis=0))
        return x


@pytest.mark.every_backend
def test_layers_that_store_values_of_rows():
    with pytest.raises(
        ValueError, match="layers that store nothing about the rows. Received: .*mean"
    ):
        fitted(dense(Remembers()))


@pytest.mark.parametrize("kind", ["metrics", "weighted_metrics"])
@pytest.mark.parametrize("metric", ["mae", keras.metrics.MeanAbsoluteError(name="error")])
def test_metrics_without_the_prefix(kind, metric):
    with pytest.raises(
        ValueError,
        match="not covered by the guarantee, so their names must begin with 'unprotected_'",
    ):
        dense().compile("sgd", "mse", privacy=dpsgd(), **{kind: [metric]})


def test_metrics_with_the_prefix_are_reported():
    model = dense()
    metric = keras.metrics.MeanAbsoluteError(name="unprotected_error")
    model.compile(keras.optimizers.SGD(0.0), "mse", privacy=dpsgd(), metrics=[metric])
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    y = np.asarray(keras.ops.convert_to_numpy(model(x))) + 2.0
    history = model.fit(x, y, batch_size=ROWS, verbose=0).history
    np.testing.assert_allclose(history["unprotected_error"], [2.0], rtol=1e-5)
    np.testing.assert_allclose(history["unprotected_loss"], [4.0], rtol=1e-5)


@pytest.mark.parametrize(
    "argument",
    [
        dict(shuffle=True),
        dict(steps_per_epoch=3),
        dict(class_weight={0: 1.0}),
        dict(validation_split=0.1),
    ],
)
def test_arguments_of_fit(argument):
    (name,) = argument
    with pytest.raises(
        ValueError, match=f"`{name}` must be None in private training: .* Received: {name}="
    ):
        fitted(**argument)


def test_validation_data_must_be_declared_public():
    data = (np.ones((4, 3), "float32"), np.ones((4, 2), "float32"))
    with pytest.raises(
        ValueError, match=r"If the data are public, set `DPSGD\(public_validation=True\)`"
    ):
        fitted(validation_data=data)
    history = fitted(validation_data=data, dpsgd_arguments=dict(public_validation=True)).history
    assert len(history["val_loss"]) == 1 and "val_unprotected_loss" not in history


@pytest.mark.parametrize(
    "kind", [keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore]
)
def test_weights_saved_without_their_ledger(kind, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"need their ledger: use `TrainingCheckpoint`. Received: {kind.__name__}",
    ):
        fitted(callbacks=[kind(str(tmp_path / "weights.weights.h5"))])


@pytest.mark.parametrize("kind", [keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau])
def test_decisions_by_unprotected_metrics(kind):
    with pytest.raises(
        ValueError, match=f"no noise protects: .* Received: {kind.__name__} of 'unprotected_loss'"
    ):
        fitted(callbacks=[kind(monitor="unprotected_loss")])


def test_train_on_batch():
    model = dense()
    model.compile("sgd", "mse", privacy=dpsgd())
    with pytest.raises(ValueError, match="samples its batches itself, in `fit`"):
        model.train_on_batch(np.ones((2, 3)), np.ones((2, 2)))


@pytest.mark.parametrize("weight", [1.5, -0.5])
def test_sample_weights_beyond_one(weight):
    with pytest.raises(ValueError, match="`sample_weight` must be from 0 to 1 in private training"):
        fitted(sample_weight=np.array([weight, *[0.5] * (ROWS - 1)]))


def contrast(y, predicted):
    """One value per row, which depends on the mean of the batch."""
    return keras.ops.mean((predicted - keras.ops.mean(predicted, axis=0)) ** 2 + y, axis=-1)


@pytest.mark.every_backend
@pytest.mark.parametrize(
    "loss", [contrast, lambda y, p: keras.ops.mean((y - p) ** 2)], ids=["contrast", "mean"]
)
def test_losses_that_mix_rows(loss):
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    with pytest.raises(ValueError, match="a loss with one value per row"):
        fitted(loss=loss, data=(x, np.ones((ROWS, 2), "float32")))


@pytest.mark.parametrize("loss", ["mse", keras.losses.Huber(), keras.losses.mean_absolute_error])
def test_losses_that_do_not_mix_rows(loss):
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    assert np.isfinite(
        fitted(loss=loss, data=(x, np.ones((ROWS, 2), "float32"))).history["unprotected_loss"][0]
    )


def test_regularizers():
    with pytest.raises(
        ValueError, match="without regularizers and `add_loss`: use the optimizer's `weight_decay`"
    ):
        fitted(dense(keras.layers.Dense(2, kernel_regularizer="l2")))


def language_model(**changes):
    model = VaultGemmaCausalLM(random_backbone(**SMALL), **changes)
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd())
    return model


def test_a_generator():
    ids = {"token_ids": np.ones((8, 5), "int32"), "padding_mask": np.ones((8, 5), "int32")}
    with pytest.raises(ValueError, match="draws its rows one by one"):
        language_model().fit(batch for batch in [(ids, ids["token_ids"])])


@pytest.mark.every_backend
@pytest.mark.skipif(backend.NAME != "tensorflow", reason="data of TensorFlow")
def test_a_dataset_of_tensorflow():
    import tensorflow as tf

    ids = {"token_ids": np.ones((8, 5), "int32"), "padding_mask": np.ones((8, 5), "int32")}
    for model, rows in (
        (language_model(), (ids, ids["token_ids"])),
        (dense(), (np.ones((8, 3), "float32"), np.ones((8, 2), "float32"))),
    ):
        model.compile(
            keras.optimizers.SGD(0.1), "mse" if len(model.layers) == 2 else "auto", privacy=dpsgd()
        )
        with pytest.raises(ValueError, match="draws its rows one by one: .* Received: "):
            model.fit(tf.data.Dataset.from_tensor_slices(rows).batch(4), verbose=0)
        assert not model.privacy.ledger.runs


@pytest.mark.every_backend
@pytest.mark.skipif(backend.NAME != "tensorflow", reason="strategies of TensorFlow")
@pytest.mark.parametrize("inside", ["the model", "`fit`"])
def test_a_strategy_of_tensorflow(inside):
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
    with strategy.scope() if inside == "the model" else contextlib.nullcontext():
        model = dense()
    around_fit = contextlib.nullcontext() if inside == "the model" else strategy.scope()
    with (
        around_fit,
        pytest.raises(
            ValueError, match="outside of a `tf.distribute` .* Received: MirroredStrategy"
        ),
    ):
        fitted(model)


@pytest.mark.every_backend
@pytest.mark.skipif(backend.NAME != "torch", reason="torch.compile is PyTorch's")
def test_a_compiler_of_pytorch():
    model = dense()
    model.compile(keras.optimizers.SGD(0.1), "mse", privacy=dpsgd(), jit_compile=True)
    with pytest.raises(
        ValueError, match="on PyTorch without `jit_compile=True`. Received: torch.compile"
    ):
        model.fit(np.ones((ROWS, 3), "float32"), np.ones((ROWS, 2), "float32"), verbose=0)


def packed(count):
    mask = np.repeat(np.arange(1, count + 1), 4)[None].repeat(ROWS, 0).astype("int32")
    return {"token_ids": np.ones_like(mask), "padding_mask": mask}


def test_packed_rows():
    x, model = packed(3), language_model()
    with pytest.raises(
        ValueError, match=r'set `DPSGD\(unit="sequence"\)`.* Received: 3 documents in a row'
    ):
        model.fit(x, x["token_ids"], batch_size=8, verbose=0)
    model.fit(packed(1), packed(1)["token_ids"], batch_size=8, verbose=0)
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd(unit="sequence"))
    model.fit(x, x["token_ids"], batch_size=8, verbose=0)
    assert model.privacy.spent().unit == "one sequence of at most 12 tokens"


@pytest.mark.every_backend
def test_a_packed_dataset(tiny):
    data = packing.PackedDataset(
        ["The fox said so."] * 30, tiny.preprocessor, batch_size=2, sequence_length=32
    )
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd())
    with pytest.raises(ValueError, match="documents in a row"):
        model.fit(data, verbose=0)


def test_16_bit_weights():
    model = VaultGemmaCausalLM(random_backbone(**SMALL, dtype="bfloat16"))
    model.compile(keras.optimizers.SGD(0.1), privacy=dpsgd())
    with pytest.raises(ValueError, match="`fit` needs float32 weights to train"):
        model.fit(packed(1), packed(1)["token_ids"], verbose=0)


@pytest.mark.every_backend
def test_a_distribution(monkeypatch):
    class Distribution:
        pass

    monkeypatch.setattr(keras.distribution, "distribution", Distribution)
    message = "distributed on the JAX backend only"
    if keras.config.backend() == "jax":
        message = "clips and counts each row once, and knows .* Received: Distribution"
    with pytest.raises(ValueError, match=message):
        fitted()


@pytest.mark.every_backend
@pytest.mark.skipif(keras.config.backend() != "jax", reason="Keras distributes models on JAX only")
@pytest.mark.parametrize(
    "counts, arguments, message",
    [
        ({"data_devices": 2}, {}, "Received: 1 metrics and 2 devices that divide the rows"),
        ({"process_count": 2}, {}, "among the processes itself: set `auto_shard_dataset=False`"),
        (
            {"process_count": 2},
            {"callbacks": [TrainingCheckpoint("unused")]},
            "`TrainingCheckpoint` resumes private training in one process. Received: 2 processes",
        ),
    ],
)
def test_what_several_devices_or_processes_cannot_do(monkeypatch, counts, arguments, message):
    devices = keras.distribution.list_devices()[:1]
    shards = not arguments
    distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=shards)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: distribution)
    for name, count in counts.items():
        monkeypatch.setattr(backend, name, lambda count=count: count)
    metrics = [keras.metrics.MeanSquaredError(name="unprotected_error")]
    with pytest.raises(ValueError, match=message):
        checks.check_distribution(arguments, metrics)


@pytest.mark.every_backend
@pytest.mark.skipif(keras.config.backend() != "jax", reason="Keras distributes models on JAX only")
def test_one_device_of_a_distribution_may_have_metrics(monkeypatch):
    devices = keras.distribution.list_devices()[:1]
    distribution = keras.distribution.DataParallel(devices=devices)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: distribution)
    checks.check_distribution({}, [keras.metrics.MeanSquaredError(name="unprotected_error")])
