from functools import cache, partial

import keras
import keras_hub
import numpy as np
import pytest
import reference
from common import count_compilations, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, backend
from keras_vaultgemma.backend import recording
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.search import cut_after_stop
from keras_vaultgemma.generation.state import Settings

ROWS = [[2, 17, 5, 99], [2, 4], [2, *range(30, 55)], [9]]
OWN = type("OwnSampler", (keras_hub.samplers.RandomSampler,), {})
"""A sampler without a `Rule`, which is called for every token."""
SLIDING = dict(
    layer_types=["sliding_attention", "full_attention"], sliding_window_size=5, num_layers=2
)


def sampler(name, **kwargs):
    kwargs = {} if name == "greedy" else dict(seed=0) | kwargs
    return keras_hub.samplers.get({"class_name": name, "config": kwargs})


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return VaultGemmaCausalLM(random_backbone(num_layers=1))


@cache
def greedy_generator(model):
    """One generator for all tests of a model, because compiling it takes most of a test's time."""
    return Generator(model, keras_hub.samplers.GreedySampler())


RANDOM = {"random": {}, "top_k": dict(k=4), "top_p": dict(p=0.7)}
ONE_RANDOM = [
    "top_p",
    *(pytest.param(name, marks=pytest.mark.first_backend) for name in ("random", "top_k")),
]
"""The samplers, of which one suffices on the other backends."""


@cache
def shared_random_generator(model, name):
    return Generator(model, OWN() if name == "own" else sampler(name, **RANDOM[name]))


def random_generator(model, name, seed=0):
    """The model's only generator of a sampler, which begins again with a seed."""
    generator = shared_random_generator(model, name)
    (state,) = generator.sampler.variables
    state.assign([seed, 0])
    return generator


@pytest.fixture(params=[pytest.param(dict(num_layers=2), marks=pytest.mark.first_backend), SLIDING])
def backbone(request):
    return random_backbone(num_key_value_heads=2, **request.param)


def test_greedy_equals_the_naive_loop(backbone):
    model = VaultGemmaCausalLM(backbone)
    expected = [reference.greedy(backbone, row, 12) for row in ROWS]
    generator = Generator(model, keras_hub.samplers.GreedySampler())
    assert generator.generate(ROWS, [12] * 4).tokens == expected
    assert [generator.generate([row], [12]).tokens[0] for row in ROWS] == expected


@pytest.mark.first_backend
def test_eager_equals_compiled(model):
    eager = Generator(model, keras_hub.samplers.GreedySampler(), run_eagerly=True)
    expected = greedy_generator(model).generate(ROWS[:2], [5, 5]).tokens
    assert eager.generate(ROWS[:2], [5, 5]).tokens == expected


def test_rows_stop_at_their_own_limit(model):
    generator = greedy_generator(model)
    full = generator.generate(ROWS, [8] * 4).tokens
    assert generator.generate(ROWS, [0, 8, 3, 1]).tokens == [
        full[0][:0],
        full[1],
        full[2][:3],
        full[3][:1],
    ]
    assert generator.generate(ROWS, [0] * 4).tokens == [[]] * 4


def test_rows_stop_at_a_stop_id_and_the_others_continue(model):
    generator = greedy_generator(model)
    full = generator.generate(ROWS, [12] * 4).tokens
    stop = full[2][4]
    expected = [cut_after_stop(row, [stop]) for row in full]
    assert len(expected[2]) <= 5
    assert generator.generate(ROWS, [12] * 4, [stop]).tokens == expected
    assert generator.generate(ROWS, [12] * 4, [127, stop, 126]).tokens == [
        cut_after_stop(r, [127, stop, 126]) for r in full
    ]


def test_decoding_ends_with_the_last_row(model):
    """Not at the limit, if all rows have stopped before it."""
    generator, states = Generator(model, keras_hub.samplers.GreedySampler()), []
    full = generator.generate(ROWS, [12] * 4).tokens
    decode = generator._decode[False]
    generator._decode[False] = lambda *args: states.append(decode(*args)) or states[-1]
    found = generator.generate(ROWS, [200] * 4, {row[5] for row in full}).tokens
    (state,) = states
    assert int(state.slot) == max(map(len, ROWS)) + max(map(len, found)) <= max(map(len, ROWS)) + 6


@pytest.mark.first_backend
def test_more_stop_ids_than_one_block(model):
    generator = greedy_generator(model)
    full = generator.generate(ROWS[:1], [6]).tokens[0]
    others = [i for i in range(128) if i not in full][:9]
    assert generator.generate(ROWS[:1], [6], [*others, full[3]]).tokens[0] == cut_after_stop(
        full, [full[3]]
    )


@pytest.mark.parametrize("name", ONE_RANDOM)
def test_a_seed_repeats_and_the_next_call_continues(model, name):
    first = random_generator(model, name, seed=1)
    a, b = first.generate(ROWS, [10] * 4).tokens, first.generate(ROWS, [10] * 4).tokens
    assert a != b
    again = random_generator(model, name, seed=1)
    assert [again.generate(ROWS, [10] * 4).tokens for _ in range(2)] == [a, b]
    assert random_generator(model, name, seed=2).generate(ROWS, [10] * 4).tokens != a


@pytest.mark.first_backend
def test_the_seed_is_that_of_the_sampler(model):
    new = Generator(model, sampler("random", seed=7)).generate(ROWS, [10] * 4).tokens
    assert new == random_generator(model, "random", seed=7).generate(ROWS, [10] * 4).tokens


def test_sampling_follows_the_distribution(model):
    """Frequencies of the first token over many draws: within four standard deviations of its probabilities."""
    row, draws = [2, 17, 5], 2000
    generator = random_generator(model, "random", seed=3)
    found = generator.generate([row] * draws, [1] * draws).tokens
    logits = reference.logits(model.backbone, row)[-1]
    p = np.exp(logits - logits.max())
    p /= p.sum()
    counts = np.bincount([ids[0] for ids in found], minlength=len(p))
    assert (np.abs(counts - draws * p) <= 4 * np.sqrt(draws * p * (1 - p)) + 1).all()


@pytest.mark.first_backend
def test_low_temperature_is_greedy(model):
    greedy = greedy_generator(model).generate(ROWS, [6] * 4).tokens
    assert (
        Generator(model, sampler("random", seed=0, temperature=1e-4)).generate(ROWS, [6] * 4).tokens
        == greedy
    )


@pytest.mark.first_backend
def test_a_custom_sampler(model):
    class Never(keras_hub.samplers.Sampler):
        """Greedy with one id forbidden."""

        def __init__(self, forbidden):
            super().__init__()
            self.forbidden = forbidden

        def get_next_token(self, probabilities):
            allowed = keras.ops.arange(probabilities.shape[-1]) != self.forbidden
            return keras.ops.argmax(keras.ops.where(allowed, probabilities, 0.0), axis=-1)

    greedy = greedy_generator(model).generate(ROWS[:1], [4]).tokens[0]
    found = Generator(model, Never(greedy[0])).generate(ROWS[:1], [4]).tokens[0]
    assert greedy[0] not in found
    logits = reference.logits(model.backbone, ROWS[0])[-1]
    assert found[0] == int(np.argsort(logits)[-2])


def test_bfloat16_generates_from_a_bfloat16_cache():
    model = VaultGemmaCausalLM(random_backbone(dtype="bfloat16"))
    assert (
        keras.backend.standardize_dtype(model.backbone.empty_cache(1, 4).keys[0].dtype)
        == "bfloat16"
    )
    found = Generator(model, keras_hub.samplers.GreedySampler()).generate(ROWS, [4] * 4).tokens
    assert [len(row) for row in found] == [4] * 4


# Options of one call.


def test_log_probs_are_those_of_the_model(model):
    for sampled in (
        keras_hub.samplers.GreedySampler(),
        sampler("top_k", k=5, temperature=2.0, seed=1),
    ):
        found = Generator(model, sampled).generate(
            ROWS, [6, 3, 6, 1], settings=Settings(repetition_penalty=1.5)
        )
        for row, tokens, log_probs in zip(ROWS, found.tokens, found.log_probs, strict=True):
            logits = reference.logits(model.backbone, row + tokens)[len(row) - 1 : -1]
            expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            np.testing.assert_allclose(log_probs, expected[range(len(tokens)), tokens], atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "greedy",
        pytest.param("random", marks=pytest.mark.first_backend),
        pytest.param("top_k", marks=pytest.mark.first_backend),
        "top_p",
    ],
)
def test_the_compiled_loop_equals_the_eager_one(model, monkeypatch, name):
    """With the sampler's own seed, and with every option."""
    settings = Settings(seed=5, repetition_penalty=1.3, min_p=0.01, logit_bias={7: -2.0})
    for options in ({}, dict(settings=settings)):
        eager = Generator(model, sampler(name, **RANDOM.get(name, {})), run_eagerly=True)
        compiled = greedy_generator(model) if name == "greedy" else random_generator(model, name)
        # On PyTorch steps are recorded after a few calls.
        monkeypatch.setattr(recording, "EAGER_CALLS", 2)
        expected, found = (g.generate(ROWS, [12, 5, 12, 9], **options) for g in (eager, compiled))
        assert found.tokens == expected.tokens
        for a, b in zip(found.log_probs, expected.log_probs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_finish_reasons(model):
    generator = greedy_generator(model)
    tokens = generator.generate(ROWS, [6] * 4).tokens
    found = generator.generate(ROWS, [6, 0, 6, 6], [tokens[0][3]])
    assert found.finish_reasons[:2] == ["stop", "length"]
    assert found.finish_reasons == [
        "stop" if row and row[-1] == tokens[0][3] else "length" for row in found.tokens
    ]


@pytest.mark.parametrize("name", ONE_RANDOM)
def test_the_text_of_a_seed_does_not_depend_on_the_batch(model, name):
    generator, rows = random_generator(model, name), [ROWS[0], ROWS[2], ROWS[0], ROWS[1]]
    settings = Settings(seed=7)
    alone = [generator.generate([row], [10], settings=settings).tokens[0] for row in rows[:2]]
    together = generator.generate(rows, [10] * 4, settings=settings).tokens
    assert together[:2] == alone and together[2] != alone[0]
    order = [1, 0, 3, 2]
    found = generator.generate([rows[i] for i in order], [10] * 4, settings=settings).tokens
    assert found == [together[i] for i in order]
    assert generator.generate(rows, [10] * 4, settings=Settings(seed=8)).tokens != together


@pytest.mark.first_backend
def test_a_seed_does_not_advance_the_sampler(model):
    generator = random_generator(model, "random", seed=1)
    expected = generator.generate(ROWS, [5] * 4).tokens
    random_generator(model, "random", seed=1).generate(ROWS, [5] * 4, settings=Settings(seed=9))
    assert generator.generate(ROWS, [5] * 4).tokens == expected


@pytest.mark.parametrize(
    "name, draws", [("top_k", 1), pytest.param("own", 2, marks=pytest.mark.first_backend)]
)
def test_a_random_sampler_is_usable_after_an_interrupt(model, name, draws):
    """Ctrl-C is raised while Python waits for a step, whose arguments are donated by then."""

    def texts(generator):
        return [
            generator.generate(ROWS, [6] * 4, settings=settings).tokens
            for settings in (Settings(seed=4), Settings())
        ]

    generator = random_generator(model, name, seed=1)
    generator.generate(ROWS[:1], [2])
    expected = texts(generator)
    interrupted = random_generator(model, name, seed=1)
    decode = interrupted._decode[False]

    def interrupt(*args):
        decode(*args)
        raise KeyboardInterrupt

    stream = interrupted.stream(ROWS[:1], [9], interval=1)
    next(stream), next(stream)
    interrupted._decode[False] = interrupt
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    interrupted._decode[False] = decode
    (state,) = interrupted.sampler.variables
    assert to_numpy(state).tolist() == [1, draws]
    assert texts(interrupted) == expected


@pytest.mark.parametrize(
    "name, draws", [("top_k", 3), pytest.param("own", 14, marks=pytest.mark.first_backend)]
)
def test_calls_between_the_steps_of_a_stream_draw_new_numbers(model, name, draws):
    generator = random_generator(model, name, seed=1)
    stream, texts = generator.stream(ROWS[:1], [4], interval=1), []
    next(stream)
    for _ in range(2):
        texts.append(generator.generate(ROWS[1:2], [5]).tokens)
        next(stream)
    assert texts[0] != texts[1]
    list(stream)
    (state,) = generator.sampler.variables
    assert to_numpy(state).tolist() == [1, draws]


def test_repetition_penalty_counts_the_prompt_and_new_tokens(model):
    """Against the naive loop."""
    row, penalty = [2, 17, 5, 17], 1.7
    expected = list(row)
    for _ in range(12):
        logits = reference.logits(model.backbone, expected)[-1]
        seen = sorted(set(expected))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        expected.append(int(logits.argmax()))
    generator = greedy_generator(model)
    settings = Settings(repetition_penalty=penalty)
    assert (
        generator.generate([row, ROWS[2]], [12, 3], settings=settings).tokens[0]
        == expected[len(row) :]
    )


def test_logit_bias_forbids_and_forces(model):
    generator = greedy_generator(model)
    plain = generator.generate(ROWS, [4] * 4).tokens
    forbidden = {row[0]: -np.inf for row in plain}
    found = generator.generate(ROWS, [4] * 4, settings=Settings(logit_bias=forbidden)).tokens
    assert not set(forbidden) & {token for row in found for token in row}
    assert (
        generator.generate(ROWS, [4] * 4, settings=Settings(logit_bias={77: 1e4})).tokens
        == [[77] * 4] * 4
    )


@pytest.mark.first_backend
def test_min_p_of_one_is_greedy(model):
    greedy = greedy_generator(model).generate(ROWS, [6] * 4).tokens
    assert (
        random_generator(model, "random")
        .generate(ROWS, [6] * 4, settings=Settings(min_p=1.0))
        .tokens
        == greedy
    )


def test_stream_yields_the_tokens_of_generate(model):
    generator = greedy_generator(model)
    expected = generator.generate(ROWS, [9, 2, 5, 9])
    parts = list(generator.stream(ROWS, [9, 2, 5, 9], interval=1))
    assert [[len(row) for row in new] for new, _ in parts] == [[1] * 4] * 2 + [[1, 0, 1, 1]] * 3 + [
        [1, 0, 0, 1]
    ] * 4
    for i in range(4):
        assert [token for new, _ in parts for token in new[i]] == expected.tokens[i]
        np.testing.assert_allclose(
            [p for _, probs in parts for p in probs[i]], expected.log_probs[i], atol=1e-5
        )


def test_rows_end_where_the_callback_returns_true(model):
    generator = greedy_generator(model)
    full = generator.generate(ROWS, [20] * 4).tokens
    found = generator.generate(
        ROWS, [20] * 4, ends=lambda i, row: (i == 1 and len(row) >= 3) or i == 3
    ).tokens
    assert found[0] == full[0] and found[2] == full[2]
    assert 3 <= len(found[1]) < 20 and found[1] == full[1][: len(found[1])]
    assert found[3] == full[3][:1]


def test_few_compilations_for_any_lengths(model, monkeypatch):
    """40 calls with prompts of 1 to 400 tokens and 1 to 500 new ones: at most 12 compiled functions."""
    signatures = set()

    def counted(function, variables, **options):
        def call(compiled, *args):
            shapes = [(tuple(x.shape), str(x.dtype)) for x in keras.tree.flatten(args)]
            signatures.add((function.__name__, str(shapes)))
            return compiled(*args)

        return partial(call, backend.compile_function(function, variables, **options))

    generator = Generator.__new__(Generator)
    monkeypatch.setattr(
        Generator,
        "_compile_function",
        lambda self, f, **options: counted(f, self.variables, **options),
    )
    generator.__init__(model, keras_hub.samplers.GreedySampler())
    random = np.random.default_rng(0)
    lengths, counts = random.integers(1, 401, 40), random.integers(1, 501, 40)
    lengths[:2], counts[:2] = (400, 1), (500, 1)
    with count_compilations() as compilations:
        for length, count in zip(lengths, counts, strict=True):
            row = random.integers(3, 100, length).tolist()
            # Any id ends the text, because the test is about compilations and not about steps.
            generator.generate([row], [int(count)], range(model.backbone.vocabulary_size))
    assert len(signatures) <= 12
    assert compilations.count is None or compilations.count <= 12
