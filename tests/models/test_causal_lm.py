import keras
import keras_hub
import numpy as np
import pytest
import reference
from common import IDS, LINES, one_layer_preset, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM
from keras_vaultgemma.generation.state import Generated


def load(**kwargs):
    return VaultGemmaCausalLM.from_preset(one_layer_preset(), **kwargs)


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


@pytest.mark.first_backend
def test_max_length_counts_the_prompt(tiny):
    prompt = "Once upon a time"
    row = tiny.preprocessor.tokenize_prompts([prompt])[0]
    assert tiny.generate(prompt, max_length=len(row)) == prompt
    with pytest.raises(
        ValueError, match=f"max_length=2 tokens.*Received: {len(row)} tokens in prompt 0"
    ):
        tiny.generate(prompt, max_length=2)
    ids = tiny.generate([row], max_length=12, stop_token_ids=None)
    assert len(ids[0]) == 12


@pytest.mark.first_backend
def test_chat_comes_back_as_the_reply(tiny):
    chat = [{"role": "user", "content": "Tell me a story."}]
    reply = tiny.generate(chat, max_new_tokens=6)
    row = tiny.preprocessor.tokenize_prompts(
        ["<start_of_turn>user\nTell me a story.<end_of_turn>\n<start_of_turn>model\n"]
    )
    ids = tiny.generate(row, max_new_tokens=6, stop_token_ids=[1, 107], strip_prompt=True)
    assert reply == tiny.preprocessor.detokenize(ids)[0].removesuffix("<end_of_turn>")
    assert tiny.generate([chat, chat], max_new_tokens=6) == [reply] * 2


@pytest.mark.first_backend
def test_text_stops_at_eos_and_chat_also_at_the_end_of_the_turn(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "keras_vaultgemma.generation.generator.Generator.generate",
        lambda self, rows, limits, stops, *others: (
            asked.append(stops) or Generated(rows, None, ["length"])
        ),
    )
    tiny.generate("Hi", max_new_tokens=3)
    tiny.generate([{"role": "user", "content": "Hi"}], max_new_tokens=3)
    tiny.generate("Hi", max_new_tokens=3, stop_token_ids=[5, 6])
    tiny.generate("Hi", max_new_tokens=3, stop_token_ids=None)
    tiny.generate("Hi", max_new_tokens=3, stop_token_ids=np.array([1, 107]))
    assert asked == [(1,), (1, 107), (5, 6), (), (1, 107)]


def test_padded_ids_in_padded_ids_out(model):
    full = model.generate([[2, 17, 5], [2]], max_length=8, stop_token_ids=None)
    right = {
        "token_ids": [[2, 17, 5, 0, 0, 0, 0, 0], [2] + [9] * 7],
        "padding_mask": [[1] * 3 + [0] * 5, [1] + [0] * 7],
    }
    left = {
        "token_ids": [[0] * 5 + [2, 17, 5], [9] * 7 + [2]],
        "padding_mask": [[0] * 5 + [1] * 3, [0] * 7 + [1]],
    }
    for inputs in (right, left):
        inputs = {key: np.array(value) for key, value in inputs.items()}
        out = model.generate(inputs, stop_token_ids=None)
        assert out["token_ids"].tolist() == full
        assert out["padding_mask"].tolist() == [[1] * 8] * 2
    stopped = model.generate(
        {k: np.array(v) for k, v in right.items()}, stop_token_ids=[full[0][4]]
    )
    n = full[0].index(full[0][4], 3) + 1
    assert stopped["token_ids"][0].tolist() == full[0][:n] + [0] * (8 - n)
    assert stopped["padding_mask"][0].tolist() == [1] * n + [0] * (8 - n)


@pytest.mark.first_backend
def test_generating_beyond_the_trained_length_warns_once(model):
    with pytest.warns(UserWarning, match="70 positions and the model was trained on 64"):
        assert len(model.generate([2, 17], max_length=70, stop_token_ids=None)) == 70


@pytest.mark.first_backend
def test_sampler_of_compile_is_used(model):
    model.compile(sampler=keras_hub.samplers.TopKSampler(k=5, seed=1))
    first = model.generate([2, 17], max_new_tokens=20, stop_token_ids=None)
    model.compile(sampler=keras_hub.samplers.TopKSampler(k=5, seed=1))
    assert model.generate([2, 17], max_new_tokens=20, stop_token_ids=None) == first
    model.compile(sampler="greedy")
    assert model.generate([2, 17], max_new_tokens=20, stop_token_ids=None)[2:] == reference.greedy(
        model.backbone, [2, 17], 20
    )


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="imports TensorFlow, which other backends never do",
)
def test_generate_and_fit_on_tf_data():
    import tensorflow as tf

    model = load()
    dataset = tf.data.Dataset.from_tensor_slices(LINES).batch(2)
    assert model.generate(dataset, max_new_tokens=4, strip_prompt=True) == model.generate(
        LINES, max_new_tokens=4, strip_prompt=True
    )
    losses = [
        model.evaluate(data, verbose=0, return_dict=True)["loss"] for data in (dataset, LINES)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    model.fit(dataset, verbose=0)


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_length=5, max_new_tokens=5), "one of `max_length` and `max_new_tokens`"),
        (
            dict(max_new_tokens=0),
            "`max_new_tokens` must be None or a positive integer. Received: max_new_tokens=0",
        ),
        (
            dict(max_length=-1),
            "`max_length` must be None or a positive integer. Received: max_length=-1",
        ),
        (
            dict(stop_token_ids="eos"),
            "`stop_token_ids` must be 'auto', None or a list of ids. Received: stop_token_ids='eos'",
        ),
    ],
)
def test_generate_refuses_options(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate("Once", **options)


@pytest.mark.first_backend
def test_without_preprocessor_stop_ids_must_be_given(model):
    with pytest.raises(ValueError, match="needs a preprocessor"):
        model.generate([2, 5], max_new_tokens=2)


def test_generate_sees_new_weights(model):
    row = [2, 17, 5]
    model.generate(row, max_new_tokens=4, stop_token_ids=None)
    model.backbone.enable_lora(2)
    for block in model.backbone.transformer_layers:
        kernel = block.attention.query.lora_kernel_b
        kernel.assign(np.random.default_rng(0).normal(size=kernel.shape) * 3)
    found = model.generate(row, max_new_tokens=4, stop_token_ids=None, strip_prompt=True)
    naive, is_token = np.array([[*row, 0, 0, 0, 0]]), np.arange(7)[None]
    for end in range(3, 7):
        logits = model({"token_ids": naive, "padding_mask": is_token < end})
        naive[0, end] = to_numpy(logits)[0, end - 1].argmax()
    assert found == naive[0, 3:].tolist()


# Loading, saving and quantising.


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.first_backend), "bfloat16"]
)
def test_save_and_reload_to_the_bit(tmp_path, dtype):
    model = load(dtype=dtype)
    assert {v.dtype for v in model.backbone.variables} == {dtype}
    model.save_to_preset(str(tmp_path / "preset"))
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset"), dtype=dtype)
    assert type(again) is VaultGemmaCausalLM
    np.testing.assert_array_equal(logits_of(again), logits_of(model))
    assert again.generate("Once", max_new_tokens=4) == model.generate("Once", max_new_tokens=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["preset"]


@pytest.mark.first_backend
def test_reload_after_fine_tuning(tmp_path):
    model = load()
    model.fit(LINES, batch_size=4, verbose=0)
    model.save_to_preset(tmp_path / "preset")
    np.testing.assert_array_equal(
        logits_of(VaultGemmaCausalLM.from_preset(tmp_path / "preset")), logits_of(model)
    )
    backbone = VaultGemmaBackbone.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(to_numpy(backbone(IDS)), to_numpy(model.backbone(IDS)))


@pytest.mark.first_backend
def test_int8(tmp_path):
    exact = logits_of(load())
    model = load()
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


@pytest.mark.first_backend
def test_load_without_weights():
    model = load(load_weights=False)
    assert not np.array_equal(logits_of(model), logits_of(load()))
    assert model.backbone.count_params() == load().backbone.count_params()


@pytest.mark.first_backend
def test_nothing_is_left_of_a_save_that_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    model = load()
    monkeypatch.setattr(model.backbone, "save_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_to_preset(tmp_path / "preset")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.first_backend
def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be saved to"):
        load().save_to_preset(tmp_path / "file" / "preset")


@pytest.mark.first_backend
def test_a_folder_without_vocabulary_needs_preprocessor_none(tmp_path):
    model = VaultGemmaCausalLM(random_backbone())
    model.save_to_preset(tmp_path / "preset")
    with pytest.raises(FileNotFoundError, match="no vocabulary.*Pass `preprocessor=None`"):
        VaultGemmaCausalLM.from_preset(tmp_path / "preset")
    again = VaultGemmaCausalLM.from_preset(tmp_path / "preset", preprocessor=None)
    np.testing.assert_array_equal(logits_of(again), logits_of(model))


@pytest.mark.first_backend
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
    assert (
        VaultGemmaCausalLM.from_preset(tmp_path, dtype="bfloat16").backbone.compute_dtype
        == "bfloat16"
    )


def test_head_is_the_embedding():
    model = VaultGemmaCausalLM(random_backbone(final_logit_soft_cap=4.0))
    hidden = np.random.default_rng(0).normal(size=(1, 2, 48)).astype("float32")
    expected = 4 * np.tanh(hidden @ to_numpy(model.backbone.token_embedding.embeddings).T / 4)
    np.testing.assert_allclose(
        to_numpy(model.logits(keras.ops.convert_to_tensor(hidden))), expected, atol=1e-5
    )
    assert model.count_params() == model.backbone.count_params()
