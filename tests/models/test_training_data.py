"""What `fit`, `evaluate`, `train_on_batch` and `test_on_batch` make of ids, labels and weights."""

import keras
import numpy as np
import pytest
from common import IDS, LINES, random_backbone, to_numpy

from keras_vaultgemma import (
    TrainingCheckpoint,
    VaultGemmaCausalLM,
    VaultGemmaCausalLMPreprocessor,
    lora,
    privacy,
)

X = {"token_ids": IDS["token_ids"], "padding_mask": IDS["padding_mask"].astype("int32")}
Y = np.array([[17, 5, 99, 31, 1], [40, 8, 0, 0, 0]])
CALLS = ("fit", "evaluate", "train_on_batch", "test_on_batch", "validation_data", "generator")


def call(model, how, x, y=None, sample_weight=None):
    if how == "validation_data":
        return model.fit(X, Y, validation_data=(x, y, sample_weight), verbose=0)
    if how == "generator":
        batch = (x,) if y is None else (x, y) if sample_weight is None else (x, y, sample_weight)
        return model.fit(iter([batch[0] if len(batch) == 1 else batch]), verbose=0)
    verbose = {} if how.endswith("on_batch") else {"verbose": 0}
    return getattr(model, how)(x, y, sample_weight=sample_weight, **verbose)


@pytest.fixture(scope="module")
def small():
    return VaultGemmaCausalLM(random_backbone(num_layers=1))


REJECTED = {
    "`sample_weight` must be at least 0.*Received: -1.0": (X, Y, np.array([1.0, -1.0])),
    "`sample_weight` must have the shape .2, 5. or .2,.*Received: .3,": (X, Y, np.ones(3)),
    "Token ids need labels `y`.*Received: y=None": (X,),
    "`y` must have the shape .2, 5., as .*Received: .2, 4": (X, Y[:, 1:]),
    "keys 'token_ids' and 'padding_mask'.*Received: .'token_ids'": (
        {"token_ids": X["token_ids"]},
        Y,
    ),
    "must have the shape .batch, length.*Received: shape .5,": (
        {name: part[0] for name, part in X.items()},
        Y[0],
    ),
}


@pytest.mark.first_backend
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("message", REJECTED)
def test_what_is_rejected(small, how, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(small, how, *REJECTED[message])


@pytest.mark.first_backend
@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_class_weight_is_rejected(small, how):
    with pytest.raises(ValueError, match="`class_weight` must be None.*`sample_weight`"):
        getattr(small, how)(X, Y, class_weight={5: 2.0})


@pytest.mark.first_backend
def test_validation_data_of_too_many_parts(small):
    with pytest.raises(ValueError, match="`validation_data` must be .* Received: a tuple of 4"):
        small.fit(X, Y, validation_data=(X, Y, None, None), verbose=0)


def test_labels_without_weights_are_those_of_tokens():
    """As if the weights of the padding, and of labels that are <pad>, were 0."""
    weights, found = (Y > 0).astype("float32"), []
    for sample_weight in (None, weights):
        keras.utils.set_random_seed(0)
        model = VaultGemmaCausalLM(random_backbone(num_layers=1))
        model.compile(keras.optimizers.SGD(1.0))
        loss = float(to_numpy(model.compute_loss(X, Y, model(X), sample_weight)))
        values = [loss, *model.test_on_batch(X, Y, sample_weight)]
        values += model.train_on_batch(X, Y, sample_weight)
        assert values[1] == pytest.approx(loss, rel=1e-5)
        found.append([np.array(values), *map(to_numpy, model.trainable_variables)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.first_backend
def test_texts_on_batch(tiny):
    model = VaultGemmaCausalLM(tiny.backbone, tiny.preprocessor)
    loss = model.evaluate(LINES, verbose=0, return_dict=True)["loss"]
    assert model.test_on_batch(LINES, return_dict=True)["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.first_backend
def test_nested_lists_are_arrays(small):
    x = {name: part.tolist() for name, part in X.items()}
    expected = small.evaluate(X, Y, verbose=0)
    assert small.evaluate(x, Y.tolist(), verbose=0) == expected
    with pytest.raises(ValueError, match="`token_ids` must have rows of one length"):
        small.evaluate({**x, "token_ids": [[2, 3], [4]]}, Y, verbose=0)


def test_an_adapter_that_changed_after_fit():
    """Training asks for another `compile`; evaluation computes with the new adapter."""
    keras.utils.set_random_seed(0)
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    model.backbone.enable_lora(2)
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(X, Y, verbose=0)
    before = model.evaluate(X, Y, verbose=0)[0]
    lora.add(model, 3, name="other", targets=["query", "value", "gate"])
    for v in model.trainable_variables:
        v.assign(np.full(v.shape, 0.2))
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(
            ValueError, match="Adapters or `trainable` changed.*call `compile` again"
        ):
            train(X, Y)
    after = model.evaluate(X, Y, verbose=0)[0]
    nats = model.score(X["token_ids"], X["padding_mask"], target_ids=Y)
    assert after == pytest.approx(nats[Y > 0].mean(), rel=1e-5) != pytest.approx(before, rel=1e-3)
    model.compile(keras.optimizers.SGD(0.1))
    assert model.fit(X, Y, verbose=0).history["loss"] == pytest.approx([after], rel=1e-5)


class Whole(keras.utils.PyDataset):
    """One batch of arrays, all of whose columns are trained on."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.batch


@pytest.mark.parametrize("how", ["texts", "ids", "checkpoint"])
def test_columns_of_padding_change_nothing(tiny, tmp_path, monkeypatch, how):
    """Keras gets 32 columns of 64, and the weights and losses are those of all of them."""
    received, fit = [], keras.Model.fit

    def record(self, x=None, *args, **kwargs):
        batch = x[0][0] if isinstance(x, keras.utils.PyDataset) else x
        received.append(batch["token_ids"].shape)
        return fit(self, x, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", record)
    preprocessor = VaultGemmaCausalLMPreprocessor(tiny.preprocessor.tokenizer, sequence_length=64)
    batch = preprocessor(LINES[:2])
    results = []
    for x, y, weight in (
        (Whole(batch), None, None),
        batch if how == "ids" else (LINES[:2], None, None),
    ):
        keras.utils.set_random_seed(0)
        backbone = random_backbone(num_layers=1, vocabulary_size=4096, max_sequence_length=64)
        model = VaultGemmaCausalLM(backbone, preprocessor)
        model.compile(keras.optimizers.SGD(0.1))
        is_saved = how == "checkpoint" and not isinstance(x, Whole)
        callbacks = [TrainingCheckpoint(tmp_path)] if is_saved else []
        logs = model.fit(
            x, y, sample_weight=weight, batch_size=2, epochs=2, verbose=0, callbacks=callbacks
        ).history
        logs["evaluated"] = model.evaluate(x, y, sample_weight=weight, verbose=0)
        results.append((logs, [to_numpy(v.value) for v in backbone.trainable_variables]))
    assert [columns for _, columns in received] == [64, 32]
    (whole_logs, whole), (logs, weights) = results
    for name, values in whole_logs.items():
        np.testing.assert_allclose(logs[name], values, rtol=1e-5)
    for expected, value in zip(whole, weights, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.first_backend
def test_private_rows_keep_their_columns():
    """Their length would tell something about the longest record."""
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    mask = np.tile(np.arange(40) < 5, (200, 1)).astype("int32")
    model.compile("sgd", privacy=privacy.DPSGD(noise_multiplier=1.0, delta=1e-3, clip_norm=1.0))
    ids = np.full((200, 40), 7)
    model.fit({"token_ids": ids, "padding_mask": mask}, ids, batch_size=8, verbose=0)
    assert "of at most 40 tokens" in model.privacy.spent().unit
