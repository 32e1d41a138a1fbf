"""Accumulated gradients, epoch losses and metrics, in which each label counts the same."""

import keras
import numpy as np
import pytest
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.data import packing

RNG = np.random.default_rng(3)
X = {"token_ids": RNG.integers(3, 128, (6, 9)), "padding_mask": np.ones((6, 9), "int32")}
Y = RNG.integers(3, 128, (6, 9))
LABELS = np.array([1, 9, 4, 0, 7, 2])
WEIGHTS = (np.arange(9) < LABELS[:, None]).astype("float32") * RNG.uniform(0.5, 2.0, (6, 1))


def make(optimizer, **options):
    keras.utils.set_random_seed(0)
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    model.compile(optimizer, **options)
    return model


def weights_after(optimizer, batch_size, data=(X, Y, WEIGHTS), epochs=2, **options):
    model = make(optimizer, **options)
    x, y, sample_weight = data
    validation = (x, y, sample_weight)
    history = model.fit(
        x,
        y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        validation_data=validation,
        validation_batch_size=2,
        verbose=0,
    ).history
    return [to_numpy(v).copy() for v in model.trainable_variables], history, model


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def optimizer(kind, steps=None):
    if kind == "sgd":
        return keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps)
    return keras.optimizers.Adam(
        0.01, epsilon=1e-3, global_clipnorm=0.1, gradient_accumulation_steps=steps
    )


@pytest.mark.parametrize("kind", [pytest.param("sgd", marks=pytest.mark.first_backend), "adam"])
def test_batches_of_different_numbers_of_labels_are_one_large_batch(kind):
    """Six rows one by one, four of them together, are batches of four and two: so is the end."""
    whole, history, _ = weights_after(optimizer(kind), 4)
    parts, of_parts, model = weights_after(optimizer(kind, 4), 1)
    assert_equal(parts, whole)
    assert int(to_numpy(model.optimizer.iterations)) == 4
    assert of_parts.keys() == history.keys()
    np.testing.assert_allclose(of_parts["val_loss"], history["val_loss"], rtol=1e-5)


def test_with_metrics_and_loss_scaling():
    options = dict(weighted_metrics=[keras.metrics.SparseCategoricalAccuracy("right")])
    options["epochs"] = 1
    whole, _, _ = weights_after(optimizer("sgd"), 2, **options)
    scaled = keras.optimizers.LossScaleOptimizer(optimizer("sgd", 2))
    parts, history, _ = weights_after(scaled, 1, **options)
    assert_equal(parts, whole)
    assert set(history) == {"loss", "right", "val_loss", "val_right"}


@pytest.mark.first_backend
@pytest.mark.parametrize("form", ["pairs", "packed"])
def test_pairs_and_packed_rows(tiny, form):
    preprocessor = VaultGemmaCausalLMPreprocessor(tiny.preprocessor.tokenizer, sequence_length=12)
    answers = ["So it was.", " Yes", "No, not at all, said the Fox to the Crow.", "Why?"]
    if form == "pairs":
        data = preprocessor({"prompts": ["The Hare"] * 4, "responses": answers})
    else:
        (data,) = packing.batches(answers, preprocessor, 4)
    x, y, sample_weight = data
    x, y = {name: part.copy() for name, part in x.items()}, y % 128
    x["token_ids"] %= 128
    data = x, y, sample_weight
    assert len(set(sample_weight.sum(axis=1))) > 1
    count = len(y)
    whole, _, _ = weights_after(optimizer("sgd"), count, data)
    assert_equal(weights_after(optimizer("sgd", count), 1, data)[0], whole)


def test_losses_and_metrics_do_not_depend_on_the_batch_size():
    """They are means over labels; a batch without labels, the fourth row, changes nothing."""
    model = make("sgd")
    nats = model.score(X["token_ids"], target_ids=Y)
    expected = (nats * WEIGHTS).sum() / WEIGHTS.sum()
    for size in (1, 2, 6):
        logs = model.evaluate(X, Y, size, WEIGHTS, verbose=0, return_dict=True)
        assert logs["loss"] == pytest.approx(expected, rel=1e-5)
        if size == 1:
            accuracy = logs["sparse_categorical_accuracy"]
        assert logs["sparse_categorical_accuracy"] == pytest.approx(accuracy, rel=1e-5)
    model = make(keras.optimizers.SGD(0.0))
    history = model.fit(X, Y, sample_weight=WEIGHTS, batch_size=1, verbose=0).history
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)
