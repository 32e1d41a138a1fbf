import keras
import numpy as np
import pytest
from common import IDS, LINES, one_layer_preset, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, VaultGemmaCausalLMPreprocessor, backend
from keras_vaultgemma.models.trainer import Trainer


def load():
    return VaultGemmaCausalLM.from_preset(one_layer_preset())


def test_fit_lowers_the_loss():
    model = load()
    model.compile(keras.optimizers.Adam(1e-3))
    before = model.evaluate(LINES, batch_size=2, verbose=0, return_dict=True)
    history = model.fit(LINES, batch_size=2, epochs=4, verbose=0, validation_data=LINES[:2]).history
    after = model.evaluate(LINES, batch_size=2, verbose=0, return_dict=True)
    assert after["loss"] < 0.8 * before["loss"]
    assert after["sparse_categorical_accuracy"] > before["sparse_categorical_accuracy"]
    assert history["loss"][-1] < history["loss"][0] and len(history["val_loss"]) == 4


def test_loss_is_the_mean_over_tokens_that_count(tiny):
    nats = tiny.score(LINES)
    x, y, weight = tiny.preprocessor(LINES)
    # `fit` also predicts <eos>, which `score` of a prompt does not.
    short = VaultGemmaCausalLMPreprocessor(
        tiny.preprocessor.tokenizer, sequence_length=64, add_end_token=False
    )
    x, y, weight = short(LINES)
    model = VaultGemmaCausalLM(tiny.backbone)
    loss = model.evaluate(x, y, sample_weight=weight, batch_size=4, verbose=0, return_dict=True)[
        "loss"
    ]
    assert loss == pytest.approx(nats.sum() / weight.sum(), rel=1e-5)


def test_lora_changes_its_factors_alone():
    model = load()
    model.backbone.enable_lora(4)
    model.compile(keras.optimizers.Adam(1e-2))
    before = {v.path: to_numpy(v).copy() for v in model.backbone.variables}
    losses = model.fit(LINES, batch_size=4, epochs=3, verbose=0).history["loss"]
    changed = {
        v.path for v in model.backbone.variables if not np.array_equal(before[v.path], to_numpy(v))
    }
    assert changed == {v.path for v in model.backbone.trainable_variables}
    assert all("lora_kernel" in path for path in changed) and len(changed) == 4
    assert losses[-1] < losses[0]


@pytest.mark.skipif(backend.NAME != "torch", reason="others compile steps by default")
@pytest.mark.parametrize("mode", [None, "int8"])
def test_torch_compile_changes_no_step(mode):
    histories = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = VaultGemmaCausalLM(random_backbone(num_layers=1))
        if mode:
            model.quantize(mode)
        model.backbone.enable_lora(2, ["query", "token_embedding"])
        model.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
        data = dict(x=IDS, y=IDS["token_ids"], verbose=0)
        histories.append(model.fit(**data, epochs=2).history["loss"] + model.evaluate(**data))
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-6)


def test_predict_gives_logits(tiny):
    x, _, _ = tiny.preprocessor(LINES[:2])
    np.testing.assert_allclose(tiny.predict(LINES[:2], verbose=0), to_numpy(tiny(x)), atol=1e-4)


def small_with_text(sequence_length):
    preprocessor = VaultGemmaCausalLMPreprocessor.from_preset(
        "vaultgemma_tiny", sequence_length=sequence_length
    )
    return VaultGemmaCausalLM(random_backbone(vocabulary_size=4096, num_layers=1), preprocessor)


@pytest.mark.first_backend
def test_loss_on_answers_alone():
    """The loss of pairs and of chats is the mean over the answers' tokens, as `score` gives them."""
    model = small_with_text(32)
    pairs = {
        "prompts": ["The Hare was", "A Crow,"],
        "responses": [" once boasting of her speed.", " half-dead"],
    }
    chat = [
        {"role": "user", "content": "Who won?"},
        {"role": "assistant", "content": "The tortoise."},
    ]
    for data in (pairs, [chat, chat]):
        x, _, weight = model.preprocessor(data)
        losses = model.score(x["token_ids"], x["padding_mask"])
        assert 0 < weight.sum() < (losses > 0).sum()
        found = model.evaluate(data, verbose=0, return_dict=True)["loss"]
        assert found == pytest.approx(losses[weight == 1].mean(), rel=1e-4)
    history = model.fit(pairs, epochs=5, validation_data=pairs, verbose=0).history
    assert history["val_loss"][-1] < history["loss"][0]


class Lines(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return LINES[2 * index : 2 * index + 2]


PAIRS = {
    "prompts": ["The Hare was", "A Crow,"] * 2,
    "responses": [" once boasting.", " half-dead", " so", " an Ass"],
}
CHATS = [
    [
        {"role": "user", "content": f"Who won {i} times?"},
        {"role": "assistant", "content": f"The {i} tortoises."},
    ]
    for i in range(4)
]


class InTwo(keras.utils.PyDataset):
    """Pairs or chats in two batches of two."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(2 * index, 2 * index + 2)
        if isinstance(self.data, dict):
            return {name: texts[rows] for name, texts in self.data.items()}
        return self.data[rows]


@pytest.mark.first_backend
@pytest.mark.parametrize("data", [PAIRS, CHATS], ids=["pairs", "chats"])
def test_pairs_and_chats_in_a_dataset(data):
    """The same training as on all of them in memory."""
    losses = []
    for x, options in ((data, dict(batch_size=2)), (InTwo(data), {})):
        keras.utils.set_random_seed(0)
        model = small_with_text(32)
        model.compile(keras.optimizers.SGD(0.1))
        logs = model.fit(
            x, epochs=2, shuffle=False, verbose=0, validation_data=x, **options
        ).history
        losses.append([*logs["loss"], *logs["val_loss"]])
    assert losses[0][1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


@pytest.mark.first_backend
def test_truncations_are_reported_once():
    model = small_with_text(24)
    count = sum(len(row) > 24 for row in model.preprocessor.tokenize_prompts(LINES))
    assert 0 < count < 4
    forms = {
        "texts": lambda: LINES,
        "PyDataset": Lines,
        "generator": lambda: iter([LINES[:2], LINES[2:]]),
    }
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        forms["tf.data"] = lambda: tf.data.Dataset.from_tensor_slices(LINES).batch(2)
    for name, data in forms.items():
        for run in (model.fit, model.evaluate):
            with pytest.warns(UserWarning, match="sequence_length") as caught:
                run(data(), **{"batch_size": 2} if name == "texts" else {}, verbose=0)
            messages = [str(w.message) for w in caught if "sequence_length" in str(w.message)]
            assert messages == [
                f"{count} of 4 rows were longer than sequence_length=24 and were truncated."
            ], name


@pytest.mark.first_backend
def test_rows_that_lose_their_answer_are_left_out():
    """Once in memory, where other rows fill the batches, and with no weight in a stream."""
    pairs = {"prompts": [LINES[0], "The Hare"], "responses": ["so it was", "and " * 40]}
    message = (
        "2 of 2 rows were longer than sequence_length=24 and were truncated. "
        "1 of 2 rows have no label to learn and are left out."
    )
    model = small_with_text(24)
    model.preprocessor.truncate = "row_end"
    alone = {name: texts[1:] for name, texts in pairs.items()}
    losses = []
    for data in (pairs, iter([pairs, pairs]), alone):
        with pytest.warns(UserWarning, match="sequence_length") as caught:
            logs = model.evaluate(data, verbose=0, return_dict=True)
            losses.append(logs["loss"])
        if data is pairs:
            assert [str(w.message) for w in caught if w.category is UserWarning] == [message]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) == pytest.approx(losses[1], rel=1e-5)
    lost = {name: texts[:1] for name, texts in pairs.items()}
    with (
        pytest.warns(UserWarning, match="1 of 1 rows have no label"),
        pytest.raises(ValueError, match="must have a row with a label to learn. Received: none"),
    ):
        model.fit(lost, verbose=0)


@pytest.mark.first_backend
@pytest.mark.parametrize("labels", [dict(y=[1, 2]), dict(sample_weight=[1, 0])])
def test_labels_and_weights_beside_texts_are_refused(tiny, labels):
    (name,) = labels
    for call in (tiny.fit, tiny.evaluate):
        with pytest.raises(ValueError, match=f"`{name}` must be None with texts"):
            call(LINES[:2], **labels)
    with pytest.raises(ValueError, match=f"`{name}` must be None with texts"):
        tiny.fit(
            LINES[:2], validation_data=(LINES[:2], labels.get("y"), labels.get("sample_weight"))
        )
    with pytest.raises(ValueError, match=f"`{name}` must be None with texts"):
        tiny.fit(iter([(LINES[:2], labels.get("y"), labels.get("sample_weight"))]))


@pytest.mark.first_backend
@pytest.mark.parametrize("label", [-100, 10**6])
def test_labels_without_weight_may_be_anything(label):
    """Loss, accuracy, score and the step, which is the gradient, are those with a label of the vocabulary."""
    x = {"token_ids": IDS["token_ids"], "padding_mask": np.ones((2, 5), "int32")}
    weights, found = IDS["padding_mask"].astype("float32"), []
    for masked in (label, 7):
        keras.utils.set_random_seed(0)
        model = VaultGemmaCausalLM(random_backbone(num_layers=1))
        model.compile(keras.optimizers.SGD(1.0))
        y = np.where(weights > 0, np.roll(IDS["token_ids"], -1, 1), masked)
        scores = [model.score(x["token_ids"], weights, target_ids=y)]
        scores += [
            np.array([*logs.values()])
            for logs in [model.evaluate(x, y, 2, weights, verbose=0, return_dict=True)]
        ]
        scores += [
            np.array(
                model.fit(x, y, sample_weight=weights, batch_size=2, verbose=0).history["loss"]
            )
        ]
        found.append([*scores, *(to_numpy(v).copy() for v in model.trainable_variables)])
    for one, other in zip(*found, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


@pytest.mark.first_backend
@pytest.mark.parametrize("label", [-100, 128])
def test_labels_and_targets_that_count_are_checked(model, label):
    y = np.full((2, 5), label)
    message = f"Labels `y` whose sample weight is not 0 must be from 0 to 127. Received: {label}"
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=message):
            call(IDS, y)
    with pytest.raises(ValueError, match=message):
        model.fit(IDS, IDS["token_ids"], validation_data=(IDS, y))
    with pytest.raises(
        ValueError, match=f"`target_ids` where the mask is true must be .*127. Received: {label}"
    ):
        model.score(**IDS, target_ids=y)


def test_labels_of_a_loss_that_ignores_some(model):
    y = np.where(IDS["padding_mask"] > 0, IDS["token_ids"], -100)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
    model.compile(keras.optimizers.SGD(0.1), loss)
    assert np.isfinite(model.fit(IDS, y, verbose=0).history["loss"]).all()


@pytest.mark.first_backend
def test_fit_refuses_no_rows(model):
    x = {"token_ids": np.zeros((0, 5), "int32"), "padding_mask": np.zeros((0, 5), "int32")}
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match="at least one batch. Received: none"):
            call(x, np.zeros((0, 5), "int32"))


@pytest.mark.first_backend
@pytest.mark.parametrize("x", [iter([]), (batch for batch in [])])
def test_empty_streams(tiny, x):
    with pytest.raises(ValueError, match="at least one batch. Received: none"):
        tiny.fit(x)


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "x, message", [([], "non-empty list"), (["a", 1], "item 1 is 1"), (3, "Received: 3")]
)
def test_fit_refuses_data(tiny, x, message):
    with pytest.raises(ValueError, match=message):
        tiny.fit(x)


@pytest.mark.first_backend
def test_fit_refuses_ids_outside_the_vocabulary(model):
    x = {"token_ids": np.array([[2, 500]]), "padding_mask": np.ones((1, 2))}
    with pytest.raises(ValueError, match="from 0 to 127. Received: 500"):
        model.fit(x, np.array([[5, 6]]))


def test_mixed_precision_trains():
    model = VaultGemmaCausalLM(random_backbone(dtype="mixed_bfloat16"))
    before = {v.path: to_numpy(v).copy() for v in model.backbone.variables}
    model.fit(
        IDS,
        np.roll(IDS["token_ids"], -1, 1),
        sample_weight=IDS["padding_mask"],
        epochs=2,
        verbose=0,
    )
    assert {v.dtype for v in model.backbone.variables} == {"float32"}
    assert all(not np.array_equal(before[v.path], to_numpy(v)) for v in model.backbone.variables)


class AnyModel(Trainer, keras.Model):
    """A model that is no language model."""


class Fails(keras.layers.Layer):
    def call(self, x, training=None):
        if training:
            raise ValueError("an error of the user's own")
        return x


def test_an_error_in_a_step_is_not_hidden():
    """Although Keras drops the optimizer's variables on JAX, which are asked for the number of steps."""
    inputs = keras.Input((3,))
    model = AnyModel(inputs, Fails()(keras.layers.Dense(2)(inputs)))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="an error of the user's own"):
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
