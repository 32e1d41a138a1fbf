import keras
import keras_hub
import numpy as np
import pytest

from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.requests import GenerationOutput
from keras_vaultgemma.generation.stream import REPLACEMENT

PROMPTS = ["Once upon a time", "The fox said to the crow", "In the garden"]


@pytest.fixture
def writes(monkeypatch):
    """`writes(ids)` makes every generator return these ids."""

    def write(script):
        def stream(self, rows, limits, stop_token_ids=(), settings=None, interval=None):
            interval = interval or len(script)
            for start in range(0, len(script), interval):
                part = script[start : start + interval]
                ended = yield [part] * len(rows), [[0.0] * len(part)] * len(rows)
                if ended is not None and all(ended):
                    return

        monkeypatch.setattr(Generator, "stream", stream)

    return write


@pytest.fixture(autouse=True)
def greedy(tiny):
    yield
    if not isinstance(tiny.sampler, keras_hub.samplers.GreedySampler):
        tiny.compile(sampler="greedy")


CHAT = [{"role": "user", "content": "Tell me a story."}]


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


@pytest.mark.first_backend
def test_a_stop_string_in_the_prompt_does_not_count(tiny):
    assert tiny.generate(PROMPTS[0], max_new_tokens=3, stop="upon") == tiny.generate(
        PROMPTS[0], max_new_tokens=3
    )


@pytest.mark.first_backend
def test_a_stop_string_does_not_begin_in_the_prompt(tiny):
    full = tiny.generate(PROMPTS[0], max_new_tokens=8)
    at = len(PROMPTS[0])
    for stop in (full[at - 3 : at + 1], full[at - 3 : at + 6]):
        assert tiny.generate(PROMPTS[0], max_new_tokens=8, stop=stop) == full
        assert "".join(tiny.stream(PROMPTS[0], max_new_tokens=8, stop=stop)) == full[at:]


@pytest.mark.first_backend
@pytest.mark.parametrize("is_random", [False, True])
def test_stop_strings_with_prompt_lookup_and_with_a_seed(tiny, is_random):
    options = dict(seed=3) if is_random else dict(prompt_lookup=True)
    if is_random:
        tiny.compile(sampler=keras_hub.samplers.TopKSampler(k=20))
    full = [continuation(tiny, prompt, 30, **options) for prompt in PROMPTS]
    stops = [full[0][11:19], full[1][5:20]]
    expected = [min((text.split(stop)[0] for stop in stops), key=len) for text in full]
    assert [len(text) for text in expected[:2]] == [11, 5] and expected[2] == full[2]
    found = continuation(
        tiny, PROMPTS, 30, stop=stops, return_log_probs=True, return_finish_reason=True, **options
    )
    assert found.output == expected and found.finish_reason == ["stop", "stop", "length"]
    for prompt, text, log_probs in zip(PROMPTS, expected, found.log_probs, strict=True):
        stream = tiny.stream(prompt, max_new_tokens=30, stop=stops, **options)
        assert "".join(stream) == text
        assert len(stream.ids) == len(log_probs) <= 30


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "stop, expected",
    [
        ("한", "fox 🦊 and "),
        ("🦊", "fox "),
        ("🦋", "fox 🦊 and 한 owl"),  # all bytes but the last are those of 🦊
        (" 🦊 a", "fox"),
        (["🦋", "d 한 o"], "fox 🦊 an"),
    ],
)
def test_a_stop_string_of_byte_tokens(tiny, writes, stop, expected):
    text = "fox 🦊 and 한 owl"
    row = list(map(int, tiny.preprocessor.tokenizer(text)))
    assert [tiny.preprocessor.tokenizer.id_to_token(i) for i in row].count("<0xF0>") == 1
    assert tiny.preprocessor.detokenize([row]) == [text]
    writes(row)
    for prompts in (PROMPTS[0], PROMPTS):
        found = continuation(tiny, prompts, 99, stop=stop, return_finish_reason=True)
        single = (
            found
            if prompts == PROMPTS[0]
            else GenerationOutput(found.output[2], None, found.finish_reason[2])
        )
        assert single == GenerationOutput(expected, None, "length" if expected == text else "stop")
    stream = tiny.stream(PROMPTS[0], max_new_tokens=99, stop=stop)
    pieces = list(stream)
    assert "".join(pieces) == expected and not any(REPLACEMENT in piece for piece in pieces)
    assert stream.finish_reason == found.finish_reason[0]


def test_log_probs_and_finish_reasons(tiny):
    plain = tiny.generate(PROMPTS, max_new_tokens=12)
    found = tiny.generate(
        PROMPTS, max_new_tokens=12, return_log_probs=True, return_finish_reason=True
    )
    assert isinstance(found, GenerationOutput) and found.output == plain
    assert found.finish_reason == ["length"] * 3
    row = tiny.preprocessor.tokenize_prompts(PROMPTS[:1])[0]
    ids = tiny.generate(row, max_new_tokens=12, stop_token_ids=[1])
    losses = tiny.score(np.array([ids]))[0]
    np.testing.assert_allclose(found.log_probs[0], -losses[len(row) - 1 : -1], atol=1e-4)

    stop = plain[0][-6:]
    one = tiny.generate(
        PROMPTS[0], max_new_tokens=40, stop=stop, return_log_probs=True, return_finish_reason=True
    )
    expected = plain[0][: plain[0].index(stop, len(PROMPTS[0]))]
    assert one.finish_reason == "stop" and one.output == expected
    np.testing.assert_allclose(one.log_probs, found.log_probs[0][: len(one.log_probs)], atol=1e-4)
    assert tiny.generate(PROMPTS[0], max_new_tokens=2, return_finish_reason=True).log_probs is None


@pytest.mark.first_backend
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
            == tiny.generate(
                prompt, max_new_tokens=25, return_finish_reason=True, **kwargs
            ).finish_reason
        )
    assert len(pieces) > 3 or kwargs


@pytest.mark.first_backend
def test_stream_of_a_chat_and_of_a_search(tiny):
    assert "".join(tiny.stream(CHAT, max_new_tokens=15)) == tiny.generate(CHAT, max_new_tokens=15)
    # Force the end of the turn after it began to answer.
    end = tiny.preprocessor.tokenizer.end_of_turn_id
    biased = dict(max_new_tokens=15, logit_bias={end: 1e4})
    assert "".join(tiny.stream(CHAT, **biased)) == tiny.generate(CHAT, **biased) == ""
    tiny.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    assert "".join(tiny.stream(PROMPTS[0], max_new_tokens=5)) == continuation(tiny, PROMPTS[0], 5)


@pytest.mark.first_backend
@pytest.mark.parametrize("stop", [(), ">", "<end", "story"])
def test_the_end_of_turn_is_not_part_of_a_reply(tiny, writes, stop):
    row = list(map(int, tiny.preprocessor.tokenizer("A reply.<end_of_turn>")))
    writes(row)
    assert tiny.generate(CHAT, max_new_tokens=99, stop=stop, return_finish_reason=True) == (
        "A reply.",
        None,
        "stop",
    )
    stream = tiny.stream(CHAT, max_new_tokens=99, stop=stop)
    assert "".join(stream) == "A reply." and stream.finish_reason == "stop" and stream.ids == row


@pytest.mark.first_backend
def test_the_end_of_turn_is_text_where_it_is_no_stop_id(tiny):
    end = tiny.preprocessor.tokenizer.end_of_turn_id
    options = dict(max_new_tokens=3, stop_token_ids=None, logit_bias={end: 1e4})
    assert (
        tiny.generate(CHAT, **options)
        == "".join(tiny.stream(CHAT, **options))
        == "<end_of_turn>" * 3
    )


def test_an_interrupt_ends_a_stream_and_leaves_the_model_usable(tiny):
    stream = tiny.stream(PROMPTS[0], max_new_tokens=20)
    generator = tiny._generator()
    decode, calls = generator._decode[False], []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*args)

    generator._decode[False] = interrupted
    try:
        pieces = list(stream)
    finally:
        generator._decode[False] = decode
    assert stream.finish_reason == "interrupted" and len(stream.ids) == 4
    assert "".join(pieces) == continuation(tiny, PROMPTS[0], 4)
    assert "".join(tiny.stream(PROMPTS[0], max_new_tokens=20)) == continuation(tiny, PROMPTS[0], 20)


@pytest.mark.first_backend
def test_same_seed_same_text(tiny):
    tiny.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9))
    alone = [continuation(tiny, prompt, 12, seed=3) for prompt in PROMPTS]
    assert continuation(tiny, PROMPTS, 12, seed=3) == alone
    assert "".join(tiny.stream(PROMPTS[1], max_new_tokens=12, seed=3)) == alone[1]
    assert continuation(tiny, PROMPTS, 12, seed=4) != alone


@pytest.mark.first_backend
@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(stop=["a", ""]),
            "`stop` must be .*non-empty strings. Received: stop=\\('a', ''\\)",
        ),
        (dict(stop=[3]), "`stop` must be"),
        (dict(seed=-1), "`seed` must be .*from 0 to 2147483647. Received: seed=-1"),
        (
            dict(repetition_penalty=0),
            "`repetition_penalty` must be .*number above 0. Received: repetition_penalty=0",
        ),
        (dict(repetition_penalty=float("nan")), "`repetition_penalty` must be"),
        (dict(min_p=1.5), "`min_p` must be .*from 0 to 1. Received: min_p=1.5"),
        (dict(logit_bias={10**6: 1.0}), "from 0 to 4095. Received: 1000000"),
        (
            dict(logit_bias={5: float("inf")}),
            "`logit_bias` must have numbers below infinity. Received: inf for id 5",
        ),
        (dict(prompt_lookup=True, min_p=0.5), "`prompt_lookup` needs greedy decoding"),
    ],
)
def test_options_out_of_range(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate("Once", max_new_tokens=2, **options)


@pytest.mark.first_backend
def test_options_that_need_text_or_one_prompt(tiny, model):
    with pytest.raises(ValueError, match="`stop` needs a preprocessor"):
        model.generate([5, 6], max_new_tokens=2, stop="x", stop_token_ids=None)
    for inputs in (["a", "b"], [5, 6]):
        with pytest.raises(ValueError, match="`inputs` of `stream` must be one string or one chat"):
            tiny.stream(inputs, max_new_tokens=2)
    tiny.compile(sampler="contrastive")
    with pytest.raises(ValueError, match="`return_log_probs` needs a sampler"):
        tiny.generate("Once", max_new_tokens=2, return_log_probs=True)


@pytest.mark.first_backend
@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="tf.data is TensorFlow's")
def test_datasets(tiny):
    """Datasets of strings, ids or dicts, batched or not, are returned as one batch."""
    import tensorflow as tf

    options = dict(max_new_tokens=4, return_log_probs=True, return_finish_reason=True)
    strings = tf.data.Dataset.from_tensor_slices(PROMPTS)
    expected = tiny.generate(PROMPTS, **options)
    assert expected.finish_reason == ["length"] * 3
    rows = np.array([row[:4] for row in tiny.preprocessor.tokenize_prompts(PROMPTS)])
    ids = tf.data.Dataset.from_tensor_slices(rows)
    expected_ids = tiny.generate(rows, **options)
    for batched in (lambda data: data, lambda data: data.batch(2)):
        for data, texts in ((strings, expected), (ids, expected_ids)):
            found = tiny.generate(batched(data), **options)
            assert (found.output, found.finish_reason) == (texts.output, texts.finish_reason)
            assert [len(row) for row in found.log_probs] == [4] * 3
            for a, b in zip(found.log_probs, texts.log_probs, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)
            assert tiny.generate(batched(data), max_new_tokens=4) == texts.output
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
    padded = {"token_ids": rows, "padding_mask": mask}
    found = tiny.generate(
        tf.data.Dataset.from_tensor_slices(padded).batch(2), max_new_tokens=4, stop_token_ids=None
    )
    whole = tiny.generate(padded, max_new_tokens=4, stop_token_ids=None)
    for key in padded:
        np.testing.assert_array_equal(found[key], whole[key])
    assert found["padding_mask"].sum(1).tolist() == [8, 7, 6]
    with pytest.raises(
        ValueError, match="`inputs` must have at least one prompt. Received: an empty dataset"
    ):
        tiny.generate(strings.take(0), max_new_tokens=4)
