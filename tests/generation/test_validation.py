"""One table: what is given to `generate`, `stream` and `score`, and the sentence that it gets."""

import math

import keras
import keras_hub
import numpy as np
import pytest
from common import random_backbone

from keras_vaultgemma import VaultGemmaCausalLM, backend

CHAT = [{"role": "user", "content": "Hi"}]
IDS = np.array([[2, 5, 7], [2, 8, 9]])
samplers = keras_hub.samplers
OTHERS = ["top_k", "beam", "contrastive"]

INPUTS = [
    (None, "string or a non-empty list of strings. Received: None"),
    (5, "string or a non-empty list of strings. Received: 5"),
    ([], "non-empty list of strings. Received: \\[\\]"),
    (["a", 3], "Every item must be a string. Received: item 1 is 3"),
    (["a", None], "Every item must be a string. Received: item 1 is None"),
    (["a", [2, 5]], "Every item must be a string. Received: item 1 is \\[2, 5\\]"),
    ("a \ud83d b", "Item 0 must be text that UTF-8 can encode.*'\\\\ud83d' at character 2"),
    (["a", "\udcff"], "Item 1 must be text that UTF-8 can encode.*'\\\\udcff' at character 0"),
    (np.array(["a", "\udcff"]), "Item 1 must be text that UTF-8 can encode"),
    (b"a\xff", "Item 0 must be text in UTF-8. Received: .*0xff"),
    ([[{"role": "user", "content": "\ud800"}]], "content of `messages\\[0\\]` must be text that UTF-8"),
    ([{"role": ["user"], "content": "Hi"}], "`messages\\[0\\]` must have the role 'user'.*role=\\['user'\\]"),
    ([{"role": None, "content": "Hi"}], "`messages\\[0\\]` must have the role 'user'.*role=None"),
    ([{"role": "user"}], "`messages\\[0\\]` must be a dict with 'role' and 'content'"),
    ([{"role": "user", "content": ["Hi"]}], "content of `messages\\[0\\]` must be a string"),
    ([CHAT, []], "`messages` must be a list of at least one message"),
    (CHAT[0], "must have the keys 'token_ids' and 'padding_mask'.*A chat is a list of messages"),
    ([[], [2, 500]], "A prompt must have at least one token. Received: none in prompt 0"),
    ([[2, 500], []], "A prompt must have at least one token. Received: none in prompt 1"),
    ([[]], "A prompt must have at least one token. Received: none in prompt 0"),
    ([2, "a"], "A prompt must be a list of ids. Received: \\[2, 'a'\\] as prompt 0"),
    ([[2, 5], [2, None]], "A prompt must be a list of ids. Received: \\[2, None\\] as prompt 1"),
    ([[2, 5], 7], "A prompt must be a list of ids. Received: 7 as prompt 1"),
    ([[2, 5], "a"], "A prompt must be a list of ids. Received: 'a' as prompt 1"),
    ([[2, 5.5]], "A prompt must be a list of ids. Received: \\[2, 5.5\\] as prompt 0"),
    ([2, True], "A prompt must be a list of ids. Received: \\[2, True\\] as prompt 0"),
    ([2, 10**6], "Token ids must be from 0 to 4095. Received: 1000000"),
    ([2, -1], "Token ids must be from 0 to 4095. Received: -1"),
    ([2, 10**30], "Token ids must be from 0 to 4095. Received: 10{30}"),
    ({"token_ids": IDS}, "must have the keys 'token_ids' and 'padding_mask'.*\\['token_ids'\\]"),
    ({"input_ids": IDS, "attention_mask": IDS}, "must have the keys.*\\['attention_mask', 'input_ids'\\]"),
    ({"token_ids": IDS, "padding_mask": np.ones((2, 2))}, "same|both have the shape.*\\(2, 3\\) and \\(2, 2\\)"),
    ({"token_ids": IDS, "padding_mask": np.ones(3)}, "both have the shape.*\\(2, 3\\) and \\(3,\\)"),
    ({"token_ids": IDS, "padding_mask": None}, "`padding_mask` must be an array of numbers"),
    ({"token_ids": [[2, 5], [2]], "padding_mask": [[1, 1], [1]]}, "`token_ids` must be an array of numbers"),
    ({"token_ids": IDS + 0.5, "padding_mask": np.ones((2, 3))}, "`token_ids` must be integers. Received: dtype float64"),
    ({"token_ids": "a", "padding_mask": "b"}, "`token_ids` must be an array of numbers"),
]  # fmt: skip

SCORED = [
    (dict(token_ids=IDS, padding_mask=np.ones((2, 2))), "both have the shape.*\\(2, 3\\) and \\(2, 2\\)"),
    (dict(token_ids=IDS, padding_mask=np.ones(2)), "both have the shape.*\\(2, 3\\) and \\(2,\\)"),
    (dict(token_ids=IDS, padding_mask="ones"), "`padding_mask` must be an array of numbers"),
    (dict(token_ids="Once", padding_mask=np.ones((1, 3))), "`token_ids` must be an array of numbers"),
    (dict(token_ids=IDS, target_ids=IDS[:, :2]), "`target_ids` must have the shape of `token_ids`.*\\(2, 2\\)"),
    (dict(token_ids=IDS, target_ids=[[1], [2, 3]]), "`target_ids` must be an array of numbers"),
    (dict(token_ids=IDS + 0.5), "`token_ids` must be integers. Received: dtype float64"),
    (dict(token_ids=np.zeros((0, 3), "int32")), "at least one row and one token.*\\(0, 3\\)"),
    (dict(token_ids=np.zeros((2, 0), "int32")), "at least one row and one token.*\\(2, 0\\)"),
    (dict(token_ids={"token_ids": IDS, "padding_mask": IDS}, padding_mask=IDS), "`padding_mask` must be None"),
    (dict(token_ids=IDS, scoring_mode="nats"), "`scoring_mode` must be 'loss' or 'logits'"),
]  # fmt: skip

OPTIONS = [
    (dict(seed=1.5), "`seed` must be None or an integer from 0 to .*seed=1.5"),
    (dict(seed=-1), "`seed` must be None or an integer from 0 to .*seed=-1"),
    (dict(seed="a"), "`seed` must be None or an integer from 0 to .*seed='a'"),
    (dict(min_p=None), "`min_p` must be a number from 0 to 1. Received: min_p=None"),
    (dict(min_p=float("nan")), "`min_p` must be a number from 0 to 1"),
    (dict(repetition_penalty=None), "`repetition_penalty` must be .* above 0"),
    (dict(repetition_penalty="1"), "`repetition_penalty` must be .* above 0"),
    (dict(length_penalty=math.inf), "`length_penalty` must be None or a number from -50 to 50"),
    (dict(stop_token_ids=1), "`stop_token_ids` must be 'auto', None or a list of ids.*stop_token_ids=1"),
    (dict(stop_token_ids="eos"), "`stop_token_ids` must be 'auto', None or a list of ids"),
    (dict(stop_token_ids=[1.5]), "`stop_token_ids` must be 'auto', None or a list of ids"),
    (dict(stop_token_ids=["a"]), "`stop_token_ids` must be 'auto', None or a list of ids"),
    (dict(stop_token_ids=[[1, 2]]), "`stop_token_ids` must be 'auto', None or a list of ids"),
    (dict(stop_token_ids=[10**6]), "`stop_token_ids` must be from 0 to 4095. Received: 1000000"),
    (dict(stop=5), "`stop` must be .*non-empty strings. Received: stop=5"),
    (dict(stop=b"x"), "`stop` must be .*non-empty strings. Received: stop=b'x'"),
    (dict(stop=["a", None]), "`stop` must be .*non-empty strings"),
    (dict(logit_bias=[5, 6]), "`logit_bias` must be None or a dict"),
    (dict(logit_bias={"a": 1.0}), "`logit_bias` must be None or a dict"),
    (dict(logit_bias={5.5: 1.0}), "`logit_bias` must be None or a dict"),
    (dict(logit_bias={5: None}), "`logit_bias` must have numbers below infinity. Received: None for id 5"),
    (dict(logit_bias={5: math.nan}), "`logit_bias` must have numbers below infinity. Received: nan"),
]  # fmt: skip

UNKNOWN = [
    (dict(temperature=0.5), "no argument `temperature`. Use `model.compile\\(sampler=.*temperature=0.5"),
    (dict(top_k=5), "no argument `top_k`. Use `model.compile\\(sampler=.*TopKSampler"),
    (dict(top_p=0.5), "no argument `top_p`. Use `model.compile\\(sampler=.*TopPSampler"),
    (dict(do_sample=True), "no argument `do_sample`. Use `model.compile\\(sampler=\"random\"\\)"),
    (dict(num_beams=3), "no argument `num_beams`. Use `model.compile\\(sampler=.*BeamSampler"),
    (dict(stop_strings=["x"]), "no argument `stop_strings`. Use `stop`"),
    (dict(eos_token_id=1), "no argument `eos_token_id`. Use `stop_token_ids`"),
    (dict(max_tokens=5), "no argument `max_tokens`. Use `max_new_tokens`"),
    (dict(max_new_token=5), "no argument `max_new_token`. Did you mean `max_new_tokens`"),
    (dict(repitition_penalty=2.0), "no argument `repitition_penalty`. Did you mean `repetition_penalty`"),
    (dict(xyz=1), "no argument `xyz`. It has inputs, max_length, .*logit_bias"),
]  # fmt: skip

SAMPLERS = [
    (samplers.RandomSampler(temperature=0), "`temperature` .*above 0.*greedy.*temperature=0$"),
    (samplers.RandomSampler(temperature=-1.5), "`temperature` .*above 0.*temperature=-1.5"),
    (samplers.TopKSampler(temperature=math.nan), "`temperature` .*above 0.*temperature=nan"),
    (samplers.TopPSampler(temperature="hot"), "`temperature` .*above 0.*temperature='hot'"),
    (samplers.BeamSampler(temperature=0.0), "`temperature` .*above 0"),
    (samplers.ContrastiveSampler(temperature=None), "`temperature` .*above 0"),
    (type("Own", (samplers.TopKSampler,), {})(temperature=0), "`temperature` .*above 0"),
    (samplers.TopKSampler(k=0), "`k` must be a positive integer. Received: k=0"),
    (samplers.TopKSampler(k=-3), "`k` must be a positive integer. Received: k=-3"),
    (samplers.TopKSampler(k=2.5), "`k` must be a positive integer. Received: k=2.5"),
    (samplers.TopPSampler(k=0), "`k` must be None or a positive integer. Received: k=0"),
    (samplers.TopPSampler(p=-0.1), "`p` must be a number from 0 to 1. Received: p=-0.1"),
    (samplers.TopPSampler(p=math.nan), "`p` must be a number from 0 to 1"),
    (samplers.ContrastiveSampler(k=0), "`k` must be a positive integer. Received: k=0"),
    (samplers.ContrastiveSampler(alpha=2), "`alpha` must be a number from 0 to 1"),
    (samplers.BeamSampler(num_beams=0), "`num_beams` must be a positive integer. Received: num_beams=0"),
    (samplers.BeamSampler(return_all_beams=True), "`return_all_beams` of the sampler must be False"),
    (samplers.TopKSampler, "`sampler` must be the name of a sampler or a `keras_hub.samplers.Sampler`"),
    (None, "`sampler` must be the name of a sampler .*sampler=None"),
]  # fmt: skip


@pytest.mark.first_backend
@pytest.mark.parametrize("inputs, message", INPUTS)
def test_inputs(tiny, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        tiny.stream(inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        tiny.score(inputs)


@pytest.mark.first_backend
@pytest.mark.parametrize("arguments, message", SCORED)
def test_arguments_of_score(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.score(**arguments)


@pytest.mark.first_backend
@pytest.mark.parametrize("options, message", OPTIONS)
def test_options(tiny, options, message):
    for function in (tiny.generate, tiny.stream):
        with pytest.raises(ValueError, match=message):
            function("Once", max_new_tokens=2, **options)


@pytest.mark.any_backend
@pytest.mark.parametrize("options, message", UNKNOWN)
def test_unknown_arguments(tiny, options, message):
    for name in ("generate", "stream"):
        with pytest.raises(TypeError, match=f"`{name}` has {message}"):
            getattr(tiny, name)("Once", **options)


@pytest.mark.first_backend
@pytest.mark.parametrize("sampler, message", SAMPLERS)
def test_samplers(tiny, sampler, message):
    tiny.compile(sampler=sampler)
    try:
        for function in (tiny.generate, tiny.stream):
            with pytest.raises(ValueError, match=message):
                function("Once", max_new_tokens=2)
    finally:
        tiny.compile(sampler="greedy")


@pytest.mark.first_backend
def test_score_takes_what_generate_takes(tiny):
    texts = ["Once upon a time", "The fox"]
    rows = tiny.preprocessor.tokenize_prompts(texts)
    expected = tiny.score(texts)
    assert expected.shape == (2, max(map(len, rows)))
    width = expected.shape[1]
    left = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    for same in (np.array(texts), tuple(texts), [text.encode() for text in texts], rows):
        np.testing.assert_array_equal(tiny.score(same), expected)
    padded = tiny.score({"token_ids": left, "padding_mask": mask})
    for i, row in enumerate(rows):
        alone = tiny.score(row)
        assert alone.shape == (1, len(row))
        np.testing.assert_allclose(alone[0], expected[i, : len(row)], atol=1e-5)
        np.testing.assert_allclose(padded[i, width - len(row) :], alone[0], atol=1e-5)
        np.testing.assert_array_equal(tiny.score(np.array(row)), alone)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    formatted = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    np.testing.assert_array_equal(tiny.score(chat), tiny.score(formatted))


@pytest.mark.parametrize(
    "sampler",
    ["greedy", *(pytest.param(name, marks=pytest.mark.first_backend) for name in OTHERS)],
)
def test_logits_that_are_not_finite_are_an_error(sampler):
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    scale = model.backbone.final_norm.scale
    scale.assign(np.full(scale.shape, np.nan))
    model.compile(sampler=sampler)
    with pytest.raises(ValueError, match="logits of .* are NaN or infinite"):
        model.generate([[2, 5], [2, 7, 8]], max_new_tokens=50, stop_token_ids=None)
    if sampler == "greedy":
        with pytest.raises(ValueError, match="logits of .* are NaN or infinite"):
            model.generate([2, 5], max_new_tokens=3, stop_token_ids=None, prompt_lookup=True)


@pytest.mark.skipif(backend.NAME == "torch", reason="PyTorch has no graphs to be inside of")
def test_inside_a_graph(tiny):
    functions = [
        lambda: tiny.generate("Once", max_new_tokens=2),
        lambda: list(tiny.stream("Once", max_new_tokens=2)),
        lambda: tiny.score(IDS),
    ]
    for function in functions:
        if backend.NAME == "jax":
            import jax

            compiled = jax.jit(function)
        else:
            import tensorflow as tf

            compiled = tf.function(function, autograph=False)
        with pytest.raises(ValueError, match="must not be called inside `tf.function`"):
            compiled()
    assert tiny.generate("Once", max_new_tokens=2).startswith("Once")


@pytest.mark.skipif(keras.config.backend() != "jax", reason="JAX_ENABLE_X64 is JAX's")
@pytest.mark.parametrize(
    "sampler",
    [
        "top_k",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("greedy", "beam", "contrastive")),
    ],
)
def test_64_bit_jax(sampler):
    """As with `JAX_ENABLE_X64=1`: the same ids and scores."""
    import jax

    rows, options = [[2, 5], [2, 7, 8, 11]], dict(max_new_tokens=4, stop_token_ids=[90])
    if sampler in ("top_k", "beam"):
        options |= dict(repetition_penalty=1.3, min_p=0.1, logit_bias={5: -1.0}, seed=3)
    if sampler == "greedy":
        options |= dict(prompt_lookup=True)
    model = VaultGemmaCausalLM(
        random_backbone(num_layers=1, layer_types=["sliding_attention"], sliding_window_size=3)
    )

    def results():
        model.compile(sampler=sampler)
        return model.generate(rows, **options), model.score(rows)

    ids, scores = results()
    jax.config.update("jax_enable_x64", True)
    try:
        found = results()
    finally:
        jax.config.update("jax_enable_x64", False)
    assert found[0] == ids
    np.testing.assert_allclose(found[1], scores, atol=1e-5)
