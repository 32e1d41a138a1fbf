import keras
import numpy as np
import pytest
import reference
from common import IDS, LINES, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, VaultGemmaCausalLMPreprocessor


def load_tiny(**kwargs):
    return VaultGemmaCausalLM.from_preset("vaultgemma_tiny", **kwargs)


def logits_of(model):
    return to_numpy(model(IDS))


def test_fit_lowers_the_loss():
    model = load_tiny()
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
    short = VaultGemmaCausalLMPreprocessor(tiny.preprocessor.tokenizer, sequence_length=64, add_end_token=False)
    x, y, weight = short(LINES)
    model = VaultGemmaCausalLM(tiny.backbone)
    loss = model.evaluate(x, y, sample_weight=weight, batch_size=4, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(nats.sum() / weight.sum(), rel=1e-5)


def test_lora_changes_its_factors_alone():
    model = load_tiny()
    model.backbone.enable_lora(4)
    model.compile(keras.optimizers.Adam(1e-2))
    before = {v.path: to_numpy(v).copy() for v in model.backbone.variables}
    losses = model.fit(LINES, batch_size=4, epochs=3, verbose=0).history["loss"]
    changed = {v.path for v in model.backbone.variables if not np.array_equal(before[v.path], to_numpy(v))}
    assert changed == {v.path for v in model.backbone.trainable_variables}
    assert all("lora_kernel" in path for path in changed) and len(changed) == 16
    assert losses[-1] < losses[0]


def test_score(model):
    token_ids, mask = IDS["token_ids"], IDS["padding_mask"]
    nats = model.score(token_ids, mask)
    for i, n in enumerate((5, 3)):
        logits = reference.logits(model.backbone, token_ids[i, :n].tolist())
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [-log_p[t, token_ids[i, t + 1]] for t in range(n - 1)]
        np.testing.assert_allclose(nats[i, : n - 1], expected, atol=1e-4)
        assert (nats[i, n - 1 :] == 0).all()
    np.testing.assert_allclose(model.score(token_ids, mask, "logits"), logits_of(model), atol=1e-5)
    targets = np.full_like(token_ids, 7)
    log_p = to_numpy(keras.ops.log_softmax(logits_of(model), axis=-1))
    np.testing.assert_allclose(model.score(token_ids, mask, target_ids=targets), -log_p[..., 7] * mask, atol=1e-4)
    with pytest.raises(ValueError, match="'loss' or 'logits'. Received: 'nats'"):
        model.score(token_ids, mask, "nats")
    with pytest.raises(ValueError, match="from 0 to 127. Received: 128"):
        model.score(np.array([[2, 128]]))


def test_score_of_text_is_score_of_its_ids(tiny):
    rows = tiny.preprocessor.tokenize_prompts(LINES[:1])
    np.testing.assert_array_equal(tiny.score(LINES[0]), tiny.score(np.array(rows)))


def test_predict_gives_logits(tiny):
    x, _, _ = tiny.preprocessor(LINES[:2])
    np.testing.assert_allclose(tiny.predict(LINES[:2], verbose=0), to_numpy(tiny(x)), atol=1e-4)


def small_with_text(sequence_length):
    preprocessor = VaultGemmaCausalLMPreprocessor.from_preset("vaultgemma_tiny", sequence_length=sequence_length)
    return VaultGemmaCausalLM(random_backbone(vocabulary_size=4096, num_layers=1), preprocessor)


def test_loss_on_answers_alone():
    """The loss of pairs and of chats is the mean over the answers' tokens, as `score` gives them."""
    model = small_with_text(32)
    pairs = {"prompts": ["The Hare was", "A Crow,"], "responses": [" once boasting of her speed.", " half-dead"]}
    chat = [{"role": "user", "content": "Who won?"}, {"role": "assistant", "content": "The tortoise."}]
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


def test_cut_rows_are_reported_once():
    model = small_with_text(24)
    count = sum(len(row) > 24 for row in model.preprocessor.tokenize_prompts(LINES))
    assert 0 < count < 4
    forms = {"texts": lambda: LINES, "PyDataset": Lines, "generator": lambda: iter([LINES[:2], LINES[2:]])}
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        forms["tf.data"] = lambda: tf.data.Dataset.from_tensor_slices(LINES).batch(2)
    for name, data in forms.items():
        for run in (model.fit, model.evaluate):
            with pytest.warns(UserWarning, match="sequence_length") as caught:
                run(data(), **{"batch_size": 2} if name == "texts" else {}, verbose=0)
            messages = [str(w.message) for w in caught if "sequence_length" in str(w.message)]
            assert messages == [f"{count} of 4 rows were longer than sequence_length=24 and were cut."], name


def test_rows_that_lose_their_answer_are_reported():
    model = small_with_text(24)
    pairs = {"prompts": [LINES[0], "The Hare"], "responses": ["so it was", "and " * 40]}
    with pytest.warns(UserWarning, match="2 of 2 rows.*; of 1 of them the whole answer was cut away"):
        loss = model.evaluate(pairs, verbose=0, return_dict=True)["loss"]
    assert np.isfinite(loss)


@pytest.mark.parametrize("x", [iter([]), (batch for batch in [])])
def test_empty_streams(tiny, x):
    with pytest.raises(ValueError, match="one batch or more. Received: none"):
        tiny.fit(x)


@pytest.mark.parametrize("x, message", [([], "non-empty list"), (["a", 1], "item 1 is 1"), (3, "Received: 3")])
def test_fit_refuses_data(tiny, x, message):
    with pytest.raises(ValueError, match=message):
        tiny.fit(x)


def test_fit_refuses_ids_outside_the_vocabulary(model):
    x = {"token_ids": np.array([[2, 500]]), "padding_mask": np.ones((1, 2))}
    with pytest.raises(ValueError, match="from 0 to 127. Received: 500"):
        model.fit(x, np.array([[5, 6]]))


def test_mixed_precision_trains():
    model = VaultGemmaCausalLM(random_backbone(dtype="mixed_bfloat16"))
    before = {v.path: to_numpy(v).copy() for v in model.backbone.variables}
    model.fit(IDS, np.roll(IDS["token_ids"], -1, 1), sample_weight=IDS["padding_mask"], epochs=2, verbose=0)
    assert {v.dtype for v in model.backbone.variables} == {"float32"}
    assert all(not np.array_equal(before[v.path], to_numpy(v)) for v in model.backbone.variables)
