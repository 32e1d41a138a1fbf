"""Steps, losses and metrics of the user's own, written as Keras's guides say."""

import functools

import keras
import numpy as np
import pytest
from common import IDS, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM

X = {"token_ids": np.tile(IDS["token_ids"], (2, 1)), "padding_mask": np.ones((4, 5), "int32")}
Y = np.roll(X["token_ids"], -1, axis=1) + 1


def jax_step(self, state, data):
    """https://keras.io/guides/custom_train_step_in_jax"""
    import jax

    trained, others, optimizer_variables, metrics_variables = state
    x, y = data

    def compute_loss_and_updates(trained, others, x, y, training=False):
        y_pred, others = self.stateless_call(trained, others, x, training=training)
        self.shapes.add(y_pred.shape)
        return self.compute_loss(x, y, y_pred), (y_pred, others)

    gradient = jax.value_and_grad(compute_loss_and_updates, has_aux=True)
    (loss, (y_pred, others)), grads = gradient(trained, others, x, y, training=True)
    trained, optimizer_variables = self.optimizer.stateless_apply(
        optimizer_variables, grads, trained
    )
    new, logs = [], {}
    for metric in self.metrics:
        own = metrics_variables[len(new) : len(new) + len(metric.variables)]
        if metric.name == "loss":
            own = metric.stateless_update_state(own, loss)
        else:
            own = metric.stateless_update_state(own, y, y_pred)
        logs[metric.name] = metric.stateless_result(own)
        new += own
    return logs, (trained, others, optimizer_variables, new)


def torch_step(self, data):
    """https://keras.io/guides/custom_train_step_in_torch"""
    import torch

    x, y = data
    self.zero_grad()
    y_pred = self(x, training=True)
    self.shapes.add(tuple(y_pred.shape))
    loss = self.compute_loss(y=y, y_pred=y_pred)
    loss.backward()
    trained = list(self.trainable_weights)
    with torch.no_grad():
        self.optimizer.apply([v.value.grad for v in trained], trained)
    return report(self, loss, y, y_pred)


def tensorflow_step(self, data):
    """https://keras.io/guides/custom_train_step_in_tensorflow"""
    import tensorflow as tf

    x, y = data
    with tf.GradientTape() as tape:
        y_pred = self(x, training=True)
        self.shapes.add(tuple(y_pred.shape)[1:])
        loss = self.compute_loss(y=y, y_pred=y_pred)
    gradients = tape.gradient(loss, self.trainable_weights)
    self.optimizer.apply(gradients, self.trainable_weights)
    return report(self, loss, y, y_pred)


def report(self, loss, y, y_pred):
    for metric in self.metrics:
        if metric.name == "loss":
            metric.update_state(loss)
        else:
            metric.update_state(y, y_pred)
    return {metric.name: metric.result() for metric in self.metrics}


STEP = {"jax": jax_step, "torch": torch_step, "tensorflow": tensorflow_step}[keras.config.backend()]


class OwnStep(VaultGemmaCausalLM):
    train_step = STEP


class OwnLoss(VaultGemmaCausalLM):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.shapes.add(tuple(y_pred.shape)[-1])
        return 2 * VaultGemmaCausalLM.compute_loss(
            self, x, y, y_pred, sample_weight, training=training
        )


class OwnMetrics(VaultGemmaCausalLM):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**logs, "width": float(y_pred.shape[-1])}


class WithoutOwn(VaultGemmaCausalLM):
    """A step that only adds to Keras's."""

    def train_step(self, *args, **kwargs):
        return super().train_step(*args, **kwargs)


def make(kind, **options):
    keras.utils.set_random_seed(0)
    model = kind(random_backbone(num_layers=1))
    model.shapes = set()
    model.compile(keras.optimizers.SGD(0.5), **options)
    return model


def fitted(model, **arguments):
    arguments = {"x": X, "y": Y, "batch_size": 4, "verbose": 0, "epochs": 2, **arguments}
    history = model.fit(**arguments).history
    return history, [to_numpy(v).copy() for v in model.trainable_variables]


@pytest.fixture(scope="module")
def default():
    model = make(VaultGemmaCausalLM)
    return (*fitted(model), model.evaluate(X, Y, verbose=0, return_dict=True))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "how", ["class", pytest.param("instance", marks=pytest.mark.first_backend)]
)
def test_a_step_as_in_the_guides(default, how):
    """It trains as the default does, and gets logits."""
    model = make(OwnStep if how == "class" else VaultGemmaCausalLM)
    if how == "instance":
        model.train_step = STEP.__get__(model)
    history, weights = fitted(model)
    assert_same(weights, default[1])
    np.testing.assert_allclose(history["loss"], default[0]["loss"], rtol=1e-5)
    assert all(shape[-1] == 128 for shape in model.shapes) and model.shapes
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert logs == pytest.approx(default[2], rel=1e-4)


@pytest.mark.parametrize(
    "how", ["class", pytest.param("instance", marks=pytest.mark.first_backend)]
)
def test_an_own_loss_gets_logits(default, how):
    model = make(OwnLoss if how == "class" else VaultGemmaCausalLM)
    if how == "instance":
        model.compute_loss = functools.partial(OwnLoss.compute_loss, model)
    before = model.evaluate(X, Y, verbose=0, return_dict=True)["loss"]
    history, _ = fitted(model, epochs=1)
    assert model.shapes == {128}
    assert history["loss"][0] == pytest.approx(2 * default[0]["loss"][0], rel=1e-5)
    assert before == pytest.approx(history["loss"][0], rel=1e-5)


def test_own_metrics_get_logits(default):
    history, weights = fitted(make(OwnMetrics))
    assert history["width"] == [128.0, 128.0]
    assert_same(weights, default[1])
    assert history["loss"] == pytest.approx(default[0]["loss"], rel=1e-5)
    accuracy = "sparse_categorical_accuracy"
    assert history[accuracy] == pytest.approx(default[0][accuracy], rel=1e-5)


@pytest.mark.first_backend
def test_a_step_that_calls_the_default(default):
    history, weights = fitted(make(WithoutOwn))
    assert_same(weights, default[1])
    assert history["loss"] == pytest.approx(default[0]["loss"], rel=1e-5)


@pytest.mark.first_backend
def test_own_weighted_metrics_beside_the_default_loss(default):
    nats = keras.metrics.SparseCategoricalCrossentropy("nats", from_logits=True)
    model = make(VaultGemmaCausalLM, weighted_metrics=[nats])
    history, weights = fitted(model)
    assert_same(weights, default[1])
    assert history["nats"] == pytest.approx(history["loss"], rel=1e-5)
    assert history["loss"] == pytest.approx(default[0]["loss"], rel=1e-5)
