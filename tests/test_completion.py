import keras
import keras_hub
import numpy as np
import pytest

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.completion import GenerationOutput

PROMPTS = ["Once upon a time", "The fox said to the crow", "In the garden"]


@pytest.fixture(autouse=True)
def greedy(tiny):
    tiny.compile(sampler="greedy")
    yield
    tiny.compile(sampler="greedy")


def continuation(tiny, prompt, count, **kwargs):
    return tiny.generate(prompt, max_new_tokens=count, strip_prompt=True, **kwargs)


def test_stop_strings_cut_exactly(tiny):
    full = [continuation(tiny, prompt, 30) for prompt in PROMPTS]
    # One string from within a word of each text, and one over several tokens.
    stops = [full[0][11:19], full[1][5:20]]
    assert len(full[0].split(stops[0])[0]) == 11 and not any(stops[0] in text for text in full[1:])
    expected = [full[0][:11], full[1][:5], full[2]]
    assert continuation(tiny, PROMPTS, 30, stop=stops) == expected
    assert [continuation(tiny, prompt, 30, stop=stops) for prompt in PROMPTS] == expected
    assert tiny.generate(PROMPTS, max_new_tokens=30, stop=stops) == [
        a + b for a, b in zip(PROMPTS, expected, strict=True)
    ]
    assert continuation(tiny, PROMPTS[0], 30, stop=stops[0]) == full[0][: full[0].find(stops[0])]


def test_a_stop_string_in_the_prompt_does_not_count(tiny):
    assert tiny.generate(PROMPTS[0], max_new_tokens=3, stop="upon") == tiny.generate(PROMPTS[0], max_new_tokens=3)


def test_log_probs_and_finish_reasons(tiny):
    plain = tiny.generate(PROMPTS, max_new_tokens=12)
    found = tiny.generate(PROMPTS, max_new_tokens=12, return_log_probs=True, return_finish_reason=True)
    assert isinstance(found, GenerationOutput) and found.output == plain
    assert found.finish_reason == ["length"] * 3
    row = tiny.preprocessor.tokenize_prompts(PROMPTS[:1])[0]
    ids = tiny.generate(row, max_new_tokens=12, stop_token_ids=[1])
    losses = tiny.score(np.array([ids]))[0]
    np.testing.assert_allclose(found.log_probs[0], -losses[len(row) - 1 : -1], atol=1e-4)

    stop = plain[0][-6:]
    one = tiny.generate(PROMPTS[0], max_new_tokens=40, stop=stop, return_log_probs=True, return_finish_reason=True)
    assert one.finish_reason == "stop" and one.output == plain[0][:-6]
    np.testing.assert_allclose(one.log_probs, found.log_probs[0][: len(one.log_probs)], atol=1e-4)
    assert tiny.generate(PROMPTS[0], max_new_tokens=2, return_finish_reason=True).log_probs is None


def test_ids_end_with_the_token_that_completes_a_stop_string(tiny):
    row = tiny.preprocessor.tokenize_prompts(PROMPTS[:1])[0]
    ids = tiny.generate(row, max_new_tokens=20, strip_prompt=True)
    stop = tiny.preprocessor.detokenize([ids[4:6]])[0].strip()
    found = tiny.generate(row, max_new_tokens=20, strip_prompt=True, stop=stop)
    assert found == ids[: len(found)] and len(found) <= 6
    assert stop in tiny.preprocessor.detokenize([found])[0]
    assert stop not in tiny.preprocessor.detokenize([found[:-1]])[0]


@pytest.mark.parametrize(
    "kwargs", [{}, dict(stop=["K", "the"]), dict(prompt_lookup=True), dict(repetition_penalty=1.3)]
)
def test_stream_joined_is_generate(tiny, kwargs):
    for prompt in PROMPTS:
        stream = tiny.stream(prompt, max_new_tokens=25, **kwargs)
        pieces = list(stream)
        assert "".join(pieces) == continuation(tiny, prompt, 25, **kwargs)
        assert (
            stream.finish_reason
            == tiny.generate(prompt, max_new_tokens=25, return_finish_reason=True, **kwargs).finish_reason
        )
    assert len(pieces) > 3 or kwargs


def test_stream_of_a_chat_and_of_a_search(tiny, monkeypatch):
    chat = [{"role": "user", "content": "Tell me a story."}]
    assert "".join(tiny.stream(chat, max_new_tokens=15)) == tiny.generate(chat, max_new_tokens=15)
    # Force the end of the turn after it began to answer.
    end = tiny.preprocessor.tokenizer.end_of_turn_id
    biased = dict(max_new_tokens=15, logit_bias={end: 1e4})
    assert "".join(tiny.stream(chat, **biased)) == tiny.generate(chat, **biased) == ""
    tiny.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    assert "".join(tiny.stream(PROMPTS[0], max_new_tokens=5)) == continuation(tiny, PROMPTS[0], 5)


def test_an_interrupt_ends_a_stream_and_leaves_the_model_usable(tiny):
    stream = tiny.stream(PROMPTS[0], max_new_tokens=20)
    generator = tiny._generator()
    go_on, calls = generator._go_on[0], []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return go_on(*args)

    generator._go_on[0] = interrupted
    try:
        pieces = list(stream)
    finally:
        generator._go_on[0] = go_on
    assert stream.finish_reason == "interrupted" and len(stream.ids) == 4
    assert "".join(pieces) == continuation(tiny, PROMPTS[0], 4)
    assert "".join(tiny.stream(PROMPTS[0], max_new_tokens=20)) == continuation(tiny, PROMPTS[0], 20)


def test_same_seed_same_text(tiny):
    tiny.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9))
    alone = [continuation(tiny, prompt, 12, seed=3) for prompt in PROMPTS]
    assert continuation(tiny, PROMPTS, 12, seed=3) == alone
    assert "".join(tiny.stream(PROMPTS[1], max_new_tokens=12, seed=3)) == alone[1]
    assert continuation(tiny, PROMPTS, 12, seed=4) != alone


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stop=["a", ""]), "`stop` must be a non-empty string or several. Received: \\('a', ''\\)"),
        (dict(stop=[3]), "`stop` must be"),
        (dict(seed=-1), "`seed` must be from 0 to 2147483647. Received: -1"),
        (dict(repetition_penalty=0), "`repetition_penalty` must be a number above 0. Received: 0"),
        (dict(repetition_penalty=float("nan")), "`repetition_penalty` must be"),
        (dict(min_p=1.5), "`min_p` must be from 0 to 1. Received: 1.5"),
        (dict(logit_bias={10**6: 1.0}), "from 0 to 4095. Received: 1000000"),
        (dict(logit_bias={5: float("inf")}), "`logit_bias` must have numbers below infinity. Received: inf for id 5"),
        (dict(prompt_lookup=True, min_p=0.5), "`prompt_lookup` follows greedy decoding"),
    ],
)
def test_options_out_of_range(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate("Once", max_new_tokens=2, **options)


def test_what_needs_text_or_one_prompt(tiny, model):
    with pytest.raises(ValueError, match="`stop` needs a preprocessor"):
        model.generate([5, 6], max_new_tokens=2, stop="x", stop_token_ids=None)
    for inputs in (["a", "b"], [5, 6]):
        with pytest.raises(ValueError, match="`inputs` of `stream` must be one string or one chat"):
            tiny.stream(inputs, max_new_tokens=2)
    tiny.compile(sampler="beam")
    with pytest.raises(ValueError, match="`return_log_probs` needs a sampler"):
        tiny.generate("Once", max_new_tokens=2, return_log_probs=True)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="tf.data is TensorFlow's")
def test_datasets_with_reasons():
    import tensorflow as tf

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    data = tf.data.Dataset.from_tensor_slices(PROMPTS).batch(2)
    found = model.generate(data, max_new_tokens=4, return_finish_reason=True)
    assert found == GenerationOutput(model.generate(PROMPTS, max_new_tokens=4), None, ["length"] * 3)
