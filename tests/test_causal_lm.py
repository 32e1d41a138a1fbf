import keras
import keras_hub
import numpy as np
import pytest
import reference
from common import random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM, VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.generation import Generated

LINES = [
    "A Wolf had been gorging on an animal he had killed, when suddenly a small bone in the meat stuck in his throat.",
    "An Ass, having put on the Lion's skin, roamed about in the forest and amused himself by frightening all.",
    "A Crow, half-dead with thirst, came upon a Pitcher which had once been full of water.",
    "The Hare was once boasting of her speed before the other animals.",
]
IDS = {
    "token_ids": np.array([[2, 17, 5, 99, 31], [2, 40, 8, 0, 0]]),
    "padding_mask": np.array([[1] * 5, [1] * 3 + [0] * 2]),
}


def load_tiny(**kwargs):
    return VaultGemmaCausalLM.from_preset("vaultgemma_tiny", **kwargs)


def logits_of(model):
    return to_numpy(model(IDS))


# Generating.


def test_text_in_text_out(tiny):
    prompt = "Once upon a time"
    text = tiny.generate(prompt, max_new_tokens=8)
    row = tiny.preprocessor.tokenize_prompts([prompt])[0]
    expected = tiny.generate(row, max_new_tokens=8, stop_token_ids=[1])
    assert text == tiny.preprocessor.detokenize([expected])[0]
    assert text.startswith(prompt) and len(text) > len(prompt)
    assert tiny.generate(prompt, max_new_tokens=8, strip_prompt=True) == text.removeprefix(prompt)
    assert tiny.generate([prompt, "The fox"], max_new_tokens=8)[0] == text
    assert tiny.generate(np.array([prompt]), max_new_tokens=8) == [text]
    assert tiny.generate(prompt, max_length=len(row) + 8) == text


def test_max_length_counts_the_prompt(tiny):
    prompt = "Once upon a time"
    row = tiny.preprocessor.tokenize_prompts([prompt])[0]
    assert tiny.generate(prompt, max_length=len(row)) == prompt
    with pytest.raises(ValueError, match=f"max_length=2 tokens.*Received: {len(row)} tokens in prompt 0"):
        tiny.generate(prompt, max_length=2)
    ids = tiny.generate([row], max_length=12, stop_token_ids=None)
    assert len(ids[0]) == 12


def test_chat_comes_back_as_the_reply(tiny):
    chat = [{"role": "user", "content": "Tell me a story."}]
    reply = tiny.generate(chat, max_new_tokens=6)
    row = tiny.preprocessor.tokenize_prompts(
        ["<start_of_turn>user\nTell me a story.<end_of_turn>\n<start_of_turn>model\n"]
    )
    ids = tiny.generate(row, max_new_tokens=6, stop_token_ids=[1, 107], strip_prompt=True)
    assert reply == tiny.preprocessor.detokenize(ids)[0].removesuffix("<end_of_turn>")
    assert tiny.generate([chat, chat], max_new_tokens=6) == [reply] * 2


def test_text_stops_at_eos_and_chat_also_at_the_end_of_the_turn(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "keras_vaultgemma.generation.Generator.generate",
        lambda self, rows, limits, stops, *others: asked.append(stops) or Generated(rows, None, ["length"]),
    )
    tiny.generate("Hi", max_new_tokens=3)
    tiny.generate([{"role": "user", "content": "Hi"}], max_new_tokens=3)
    tiny.generate("Hi", max_new_tokens=3, stop_token_ids=[5, 6])
    tiny.generate("Hi", max_new_tokens=3, stop_token_ids=None)
    assert asked == [(1,), (1, 107), (5, 6), ()]


def test_padded_ids_in_padded_ids_out(model):
    full = model.generate([[2, 17, 5], [2]], max_length=8, stop_token_ids=None)
    right = {
        "token_ids": [[2, 17, 5, 0, 0, 0, 0, 0], [2] + [9] * 7],
        "padding_mask": [[1] * 3 + [0] * 5, [1] + [0] * 7],
    }
    left = {"token_ids": [[0] * 5 + [2, 17, 5], [9] * 7 + [2]], "padding_mask": [[0] * 5 + [1] * 3, [0] * 7 + [1]]}
    for inputs in (right, left):
        inputs = {key: np.array(value) for key, value in inputs.items()}
        out = model.generate(inputs, stop_token_ids=None)
        assert out["token_ids"].tolist() == full
        assert out["padding_mask"].tolist() == [[1] * 8] * 2
    stopped = model.generate({k: np.array(v) for k, v in right.items()}, stop_token_ids=[full[0][4]])
    n = full[0].index(full[0][4], 3) + 1
    assert stopped["token_ids"][0].tolist() == full[0][:n] + [0] * (8 - n)
    assert stopped["padding_mask"][0].tolist() == [1] * n + [0] * (8 - n)


def test_generating_beyond_the_trained_length_warns_once(model):
    with pytest.warns(UserWarning, match="70 positions and the model was trained on 64"):
        assert len(model.generate([2, 17], max_length=70, stop_token_ids=None)) == 70


def test_sampler_of_compile_is_used(model):
    model.compile(sampler=keras_hub.samplers.TopKSampler(k=5, seed=1))
    first = model.generate([2, 17], max_new_tokens=20, stop_token_ids=None)
    model.compile(sampler=keras_hub.samplers.TopKSampler(k=5, seed=1))
    assert model.generate([2, 17], max_new_tokens=20, stop_token_ids=None) == first
    model.compile(sampler="greedy")
    assert model.generate([2, 17], max_new_tokens=20, stop_token_ids=None)[2:] == reference.greedy(
        model.backbone, [2, 17], 20
    )


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="imports TensorFlow, which other backends never do")
def test_generate_and_fit_on_tf_data():
    import tensorflow as tf

    model = load_tiny()
    dataset = tf.data.Dataset.from_tensor_slices(LINES).batch(2)
    assert model.generate(dataset, max_new_tokens=4, strip_prompt=True) == model.generate(
        LINES, max_new_tokens=4, strip_prompt=True
    )
    losses = [model.evaluate(data, verbose=0, return_dict=True)["loss"] for data in (dataset, LINES)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    model.fit(dataset, verbose=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_length=5, max_new_tokens=5), "one of `max_length` and `max_new_tokens`"),
        (dict(max_new_tokens=0), "`max_new_tokens` must be 1 or more. Received: 0"),
        (dict(max_length=-1), "`max_length` must be 1 or more. Received: -1"),
        (dict(stop_token_ids="eos"), "`stop_token_ids` must be 'auto', None or a list of ids. Received: 'eos'"),
    ],
)
def test_generate_refuses_options(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate("Once", **options)


def test_without_preprocessor_stop_ids_must_be_given(model):
    with pytest.raises(ValueError, match="needs a preprocessor"):
        model.generate([2, 5], max_new_tokens=2)


# Training and scoring.


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


def test_generate_sees_new_weights(model):
    row = [2, 17, 5]
    model.generate(row, max_new_tokens=4, stop_token_ids=None)
    model.backbone.enable_lora(2)
    for block in model.backbone.transformer_layers:
        kernel = block.attention.query.lora_kernel_b
        kernel.assign(np.random.default_rng(0).normal(size=kernel.shape) * 3)
    found = model.generate(row, max_new_tokens=4, stop_token_ids=None, strip_prompt=True)
    naive = list(row)
    for _ in range(4):
        x = {"token_ids": np.array([naive]), "padding_mask": np.ones((1, len(naive)), "int32")}
        naive.append(int(to_numpy(model(x))[0, -1].argmax()))
    assert found == naive[3:]


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


# Loading, saving and quantising.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_reload_to_the_bit(tmp_path, dtype):
    model = load_tiny(dtype=dtype)
    assert {v.dtype for v in model.backbone.variables} == {dtype}
    model.save_to_preset(str(tmp_path / "preset"))
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset"), dtype=dtype)
    assert type(again) is VaultGemmaCausalLM
    np.testing.assert_array_equal(logits_of(again), logits_of(model))
    assert again.generate("Once", max_new_tokens=4) == model.generate("Once", max_new_tokens=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["preset"]


def test_reload_after_fine_tuning(tmp_path):
    model = load_tiny()
    model.fit(LINES, batch_size=4, verbose=0)
    model.save_to_preset(tmp_path / "preset")
    np.testing.assert_array_equal(logits_of(VaultGemmaCausalLM.from_preset(tmp_path / "preset")), logits_of(model))
    backbone = VaultGemmaBackbone.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(to_numpy(backbone(IDS)), to_numpy(model.backbone(IDS)))


def test_int8(tmp_path):
    exact = logits_of(load_tiny())
    model = load_tiny()
    model.quantize("int8")
    kinds = {v.dtype for v in model.backbone.variables if len(v.shape) == 2}
    assert "int8" in kinds
    quantized = logits_of(model)
    assert 0 < np.abs(quantized - exact).max() < 0.2 * np.abs(exact).max()
    text = model.generate("Once upon a time", max_new_tokens=8)
    model.save_to_preset(tmp_path / "preset")
    again = VaultGemmaCausalLM.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(logits_of(again), quantized)
    assert again.generate("Once upon a time", max_new_tokens=8) == text


def test_load_without_weights():
    model = load_tiny(load_weights=False)
    assert not np.array_equal(logits_of(model), logits_of(load_tiny()))
    assert model.backbone.count_params() == 2_754_240


def test_nothing_is_left_of_a_save_that_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    model = load_tiny()
    monkeypatch.setattr(model.backbone, "save_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_to_preset(tmp_path / "preset")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be saved to"):
        load_tiny().save_to_preset(tmp_path / "file" / "preset")


def test_a_folder_without_vocabulary_needs_preprocessor_none(tmp_path):
    model = VaultGemmaCausalLM(random_backbone())
    model.save_to_preset(tmp_path / "preset")
    with pytest.raises(FileNotFoundError, match="no vocabulary.*Pass `preprocessor=None`"):
        VaultGemmaCausalLM.from_preset(tmp_path / "preset")
    again = VaultGemmaCausalLM.from_preset(tmp_path / "preset", preprocessor=None)
    np.testing.assert_array_equal(logits_of(again), logits_of(model))


def test_hugging_face_folder_with_vocabulary(tmp_path, tiny):
    import transformers

    config = transformers.VaultGemmaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=48,
    )
    transformers.VaultGemmaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tiny.preprocessor.tokenizer.proto)
    model = VaultGemmaCausalLM.from_preset(tmp_path)
    assert model.preprocessor.sequence_length == 48
    assert model.generate("Once upon", max_new_tokens=3).startswith("Once upon")
    assert VaultGemmaCausalLM.from_preset(tmp_path, dtype="bfloat16").backbone.compute_dtype == "bfloat16"


def test_head_is_the_embedding():
    model = VaultGemmaCausalLM(random_backbone(final_logit_soft_cap=4.0))
    hidden = np.random.default_rng(0).normal(size=(1, 2, 48)).astype("float32")
    expected = 4 * np.tanh(hidden @ to_numpy(model.backbone.token_embedding.embeddings).T / 4)
    np.testing.assert_allclose(to_numpy(model.logits(keras.ops.convert_to_tensor(hidden))), expected, atol=1e-5)
    assert model.count_params() == model.backbone.count_params()
