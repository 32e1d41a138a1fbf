import keras
import keras_hub
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend
from keras_vaultgemma.generation import sampling
from keras_vaultgemma.generation.sampling import Rule, rule_of

STEP = np.float32(2**-23)


@pytest.fixture(params=["eager", "compiled"])
def call(request):
    """Calls a function of arrays, eagerly or compiled as generation does, and returns an array."""

    def run(function, *arrays):
        arguments = [keras.ops.convert_to_tensor(np.asarray(x)) for x in arrays]
        compiled = (
            backend.compile_function(function, []) if request.param == "compiled" else function
        )
        return to_numpy(compiled(*arguments))

    return run


def random_logits(*shape):
    return np.random.default_rng(0).normal(scale=3, size=shape).astype("float32")


def random_probabilities(*shape):
    weights = np.exp(random_logits(*shape).astype("float64"))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype("float32")


def most_likely_until(probabilities, p):
    """`top_p` of one row by sorting, in float64; for rows without ties."""
    kept, mass = np.zeros_like(probabilities), 0.0
    for i in np.argsort(-probabilities):
        if mass >= p:
            break
        kept[i] = probabilities[i]
        mass += float(probabilities[i])
    return kept


SEEN = [[3, 3, -1, 0, 3, 6], [-1, -7, -1, -1, -1, -1], [6, 5, 4, 3, 2, 1], [-1, -1, 6, 6, 6, 6]]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.5])
def test_repetition_penalty_counts_each_id_once(call, penalty):
    logits = random_logits(4, 7)
    logits[0, 3], logits[2, 3], logits[:, 0] = 2.0, -2.0, 0.0
    expected = logits.copy()
    for row, ids in zip(expected, SEEN, strict=True):
        for i in {i for i in ids if i >= 0}:
            row[i] = row[i] / penalty if row[i] > 0 else row[i] * penalty
    found = call(sampling.repetition_penalty, logits, np.array(SEEN, "int32"), np.float32(penalty))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[1], logits[1])


def test_repetition_penalty_of_many_repetitions_in_a_large_vocabulary(call):
    logits = random_logits(2, 256_000)
    seen = np.random.default_rng(1).integers(-50, 50, (2, 4000)).astype("int32")
    found = call(sampling.repetition_penalty, logits, seen, np.float32(2))
    expected = logits.copy()
    expected[:, :50] = np.where(logits[:, :50] > 0, logits[:, :50] / 2, logits[:, :50] * 2)
    np.testing.assert_array_equal(found, expected)


def test_logit_bias_is_added_in_every_row(call):
    logits = random_logits(3, 6)
    found = call(
        sampling.logit_bias,
        logits,
        np.array([4, -1, 0, -1], "int32"),
        np.array([2, 9, -3, 7], "float32"),
    )
    expected = logits + np.array([-3, 0, 0, 0, 2, 0], "float32")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bias", [-np.inf, -1e38, -1e30])
def test_logit_bias_forbids_without_nan(call, bias):
    def chances(logits, ids, bias):
        return sampling.probabilities(sampling.logit_bias(logits, ids, bias), Rule("random", 0.01))

    logits, ids = random_logits(2, 8), np.arange(8, dtype="int32")
    found = call(chances, logits, np.where(ids < 5, ids, -1), np.full(8, bias, "float32"))
    np.testing.assert_array_equal(found[:, :5], 0)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    # Nothing is left to choose from: any number but NaN.
    assert np.isfinite(call(chances, logits, ids, np.full(8, bias, "float32"))).all()


def test_infinite_logit_bias_forces(call):
    found = call(
        sampling.logit_bias,
        random_logits(2, 8),
        np.array([5], "int32"),
        np.array([np.inf], "float32"),
    )
    np.testing.assert_array_equal(
        call(lambda x: sampling.probabilities(x, Rule("random")), found), np.eye(8)[[5, 5]]
    )


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.25, 1.0])
def test_min_p_keeps_a_share_of_the_largest(call, threshold):
    probabilities = np.array(
        [[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.2, 0.2, 0.2, 0.2, 0.2], [0, 0, 0.03, 0.97, 0]]
    )
    probabilities = probabilities.astype("float32")
    expected = [[x if x >= threshold * max(row) else 0 for x in row] for row in probabilities]
    found = call(sampling.min_p, probabilities, np.float32(threshold))
    np.testing.assert_array_equal(found, np.array(expected, "float32"))


@pytest.mark.parametrize("k", [1, 2, 17, 99, 100, 1000])
def test_top_k_keeps_the_k_largest(call, k):
    probabilities = random_probabilities(3, 100)
    expected = np.zeros_like(probabilities)
    for row, kept in zip(probabilities, expected, strict=True):
        for i in sorted(range(100), key=lambda i: -row[i])[:k]:
            kept[i] = row[i]
    np.testing.assert_array_equal(call(lambda x: sampling.top_k(x, k), probabilities), expected)


def test_top_k_keeps_ties():
    found = to_numpy(sampling.top_k(keras.ops.array([[0.1, 0.3, 0.1, 0.4, 0.1]], "float32"), 3))
    np.testing.assert_array_equal(found, np.array([[0.1, 0.3, 0.1, 0.4, 0.1]], "float32"))


# 0.75 is where two tokens reach it exactly.
@pytest.mark.parametrize(
    "p, kept",
    [
        (0.0, 1),
        (0.4, 1),
        (0.5, 1),
        (0.51, 2),
        (0.75, 2),
        (0.76, 3),
        (0.96, 5),
        (0.97, 6),
        (1.0, 6),
        (2.0, 6),
    ],
)
def test_top_p_keeps_the_token_that_crosses(call, p, kept):
    probabilities = np.array([[2**-5, 0.5, 2**-4, 0, 2**-3, 0.25, 2**-6]], "float32")
    threshold = np.sort(probabilities[0])[-kept]
    expected = np.where(probabilities >= threshold, probabilities, 0)
    np.testing.assert_array_equal(call(lambda x: sampling.top_p(x, p), probabilities), expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_sorting(call, p):
    probabilities = random_probabilities(20, 300)
    expected = np.array([most_likely_until(row, p) for row in probabilities])
    np.testing.assert_array_equal(call(lambda x: sampling.top_p(x, p), probabilities), expected)


def test_rows_have_a_temperature_and_top_p_of_their_own(call):
    logits, temperature, p = (
        random_logits(4, 50),
        [[0.5], [1.0], [1.0], [2.0]],
        [[0.3], [0.9], [1.0], [1.0]],
    )
    found = call(
        lambda x, t, p: sampling.probabilities(x, Rule("random", t, p=p)),
        logits,
        np.array(temperature, "float32"),
        np.array(p, "float32"),
    )
    for i, row in enumerate(found):
        rule = Rule("random", temperature[i][0], p=p[i][0])
        expected = to_numpy(sampling.probabilities(logits[i : i + 1], rule))[0]
        np.testing.assert_allclose(row, expected, rtol=1e-5)
        assert (row > 0).tolist() == (expected > 0).tolist()


def test_top_p_tells_neighbouring_float32_apart(call):
    larger = np.nextafter(np.float32(0.25), np.float32(1))
    probabilities = np.array([[0.25, larger, 0.25, 0.1875]], "float32")
    found = call(lambda x: sampling.top_p(x, 0.25), probabilities)
    np.testing.assert_array_equal(found, [[0, larger, 0, 0]])
    # It reaches p alone, also exactly.
    found = call(lambda x: sampling.top_p(x, float(larger)), probabilities)
    np.testing.assert_array_equal(found, [[0, larger, 0, 0]])
    # The next ones are equal, and both stay.
    np.testing.assert_array_equal(
        call(lambda x: sampling.top_p(x, 0.3), probabilities), [[0.25, larger, 0.25, 0]]
    )


def test_top_p_keeps_all_that_does_not_reach_p(call):
    probabilities = np.array([[0.25, 0, 0.125, 0.125]], "float32")
    np.testing.assert_array_equal(
        call(lambda x: sampling.top_p(x, 0.75), probabilities), probabilities
    )


def test_top_p_of_1_keeps_what_rounding_would_drop(call):
    probabilities = np.array([[1.0, 1e-9, 1e-30, 0.0]], "float32")
    np.testing.assert_array_equal(
        call(lambda x: sampling.top_p(x, 1.0), probabilities), probabilities
    )


def test_top_p_of_a_large_vocabulary(call):
    probabilities = random_probabilities(2, 256_000)
    found = call(lambda x: sampling.top_p(x, 0.9), probabilities)
    for row, kept in zip(probabilities.astype("float64"), found, strict=True):
        # The sums of 256,000 numbers are exact to about 1e-5.
        assert row[kept > 0].sum() == pytest.approx(0.9, abs=2e-5)
        assert row[kept > 0].min() > row[kept == 0].max()


# With two levels: 1 block, a last block of one number, a full square, many.
@pytest.mark.parametrize("size", [1, 2, 5, 49, 50, 1000])
def test_draw_frequencies_are_the_probabilities(call, size):
    counts = np.random.default_rng(0).multinomial(
        4096, random_probabilities(size).astype("float64")
    )
    grid = (np.arange(4096) / 4096).astype("float32")
    # Exact sums, so that not one draw may fall elsewhere; the total is 2.
    rows = np.tile((counts / 2048).astype("float32"), (4096, 1))
    drawn = call(sampling.draw, rows, grid)
    assert drawn.dtype == "int32"
    np.testing.assert_array_equal(drawn, np.repeat(np.arange(size), counts))


def test_draw_frequencies_of_rounded_probabilities(call):
    probabilities = random_probabilities(1000)
    drawn = call(
        sampling.draw, np.tile(probabilities, (4096, 1)), (np.arange(4096) / 4096).astype("float32")
    )
    counts = np.bincount(drawn, minlength=1000)
    assert np.abs(counts - probabilities * 4096.0).max() < 1.01
    assert (np.diff(drawn) >= 0).all()


def test_draw_equals_the_written_out_one(call):
    probabilities, generator = random_probabilities(200, 700), np.random.default_rng(1)
    uniform = generator.integers(0, 2**23, 200) * STEP
    drawn = call(sampling.draw, probabilities, uniform.astype("float32"))
    for row, number, token in zip(probabilities.astype("float64"), uniform, drawn, strict=True):
        below, upto = row[:token].sum(), row[: token + 1].sum()
        assert below - 1e-6 <= number * row.sum() < upto + 1e-6


EXTREMES = [0, STEP, 0.25, 0.5, 0.75, 1 - 2 * STEP, 1 - STEP]


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_draw_never_returns_a_token_of_probability_0(call, scale):
    probabilities = np.random.default_rng(0).random((len(EXTREMES), 256_000)).astype("float32") ** 4
    probabilities[np.random.default_rng(1).random(probabilities.shape) < 0.5] = 0
    probabilities[:, :1000] = probabilities[:, -1500:] = 0
    probabilities *= np.float32(scale)
    drawn = call(sampling.draw, probabilities, np.array(EXTREMES, "float32"))
    assert (probabilities[np.arange(len(drawn)), drawn] > 0).all()
    # The ends of the numbers are the ends of the vocabulary.
    assert drawn[0] == np.flatnonzero(probabilities[0])[0]
    assert drawn[-1] > 250_000


def test_draw_passes_over_probability_0_where_cumulated_sums_round():
    # XLA adds up in a tree: cumulated sums change and decrease at blocks of 0, and a number may fall right there.
    width, generator = 506, np.random.default_rng(0)
    probabilities = generator.random((20, width, width)).astype("float32") ** 4
    probabilities[generator.random((20, width)) < 0.5] = 0
    masses = keras.ops.sum(keras.ops.convert_to_tensor(probabilities), axis=2)
    reached = to_numpy(backend.compile_function(lambda x: keras.ops.cumsum(x, axis=1), [])(masses))
    rows, places = np.nonzero((np.diff(reached, axis=1) != 0) & (to_numpy(masses)[:, 1:] == 0))
    if not rows.size:
        pytest.skip("cumulated sums of this backend do not change at 0")
    lower = np.minimum(reached[rows, places], reached[rows, places + 1]) / reached[rows, -1]
    uniform = (
        ((np.floor(lower / STEP)[:, None] + np.arange(-2, 3)) * STEP)
        .clip(0, 1 - STEP)
        .astype("float32")
    )
    draw = backend.compile_function(sampling.draw, [])
    probabilities = probabilities.reshape(20, -1)
    for row in set(rows):
        numbers = np.resize(uniform[rows == row], 20)
        same = np.repeat(probabilities[[row]], 20, axis=0)
        chosen = to_numpy(draw(*map(keras.ops.convert_to_tensor, (same, numbers))))
        assert (probabilities[row, chosen] > 0).all()


@pytest.mark.parametrize("tiny", [1e-20, 1e-38, 1e-44])
def test_draw_with_probabilities_that_vanish_beside_others(call, tiny):
    probabilities = np.zeros((len(EXTREMES), 100), "float32")
    probabilities[:, [3, 20, 60, 99]] = tiny
    probabilities[:, 57] = 1
    drawn = call(sampling.draw, probabilities, np.array(EXTREMES, "float32"))
    assert set(drawn[1:]) == {57}
    assert drawn[0] in (3, 57)  # 1e-44 is 0 to XLA


def test_draw_from_one_token(call):
    for token in (0, 7, 99):
        probabilities = np.tile(
            np.eye(100, dtype="float32")[token] * np.float32(0.3), (len(EXTREMES), 1)
        )
        np.testing.assert_array_equal(
            call(sampling.draw, probabilities, np.array(EXTREMES, "float32")), token
        )


def test_uniforms_are_multiples_within_the_unit_interval():
    numbers = sampling.uniforms([3], [[1]], 10_000)
    assert numbers.shape == (1, 10_000) and numbers.dtype == "float32"
    assert ((numbers >= 0) & (numbers < 1)).all()
    steps = numbers.astype("float64") * 2**23
    np.testing.assert_array_equal(steps, np.round(steps))
    assert len(np.unique(steps % 1024)) == 1024
    shares = np.bincount((numbers[0] * 16).astype(int), minlength=16) / 10_000
    np.testing.assert_allclose(shares, 1 / 16, atol=0.01)


def test_uniforms_depend_on_entropy_and_repetition_only():
    rows = [[5, 6], [7], [5, 6], [8, 9, 10], [5, 6], [7], []]
    numbers = sampling.uniforms([1, 2], rows, 8)
    repetitions = [0, 0, 1, 0, 2, 1, 0]
    alone = sampling.uniforms([1, 2], [[4]] * 3, 8)
    assert len(np.unique(alone)) == 24
    np.testing.assert_array_equal(numbers, alone[repetitions])
    # Any order of the rows, lists or arrays.
    reverse = sampling.uniforms([1, 2], [np.array(row, "int32") for row in rows[1::-1]], 8)
    np.testing.assert_array_equal(reverse, numbers[1::-1])


def test_uniforms_of_any_entropy_differ():
    entropies = [[0], [1], [2], [2**32], [1, 1], [1, 2], [2, 1], [1, 2, 3], [2**63, 5]]
    numbers = np.concatenate([sampling.uniforms(entropy, [[0]] * 4, 3) for entropy in entropies])
    assert len(np.unique(numbers, axis=0)) == 4 * len(entropies)
    from_arrays = sampling.uniforms(np.array([1, 2], "uint32"), [[0]] * 4, 3)
    np.testing.assert_array_equal(from_arrays, sampling.uniforms([1, 2], [[0]] * 4, 3))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 63, 64])
def test_the_first_uniforms_do_not_depend_on_their_number(count):
    numbers = sampling.uniforms([9], [[1], [1], [2]], 1000)
    np.testing.assert_array_equal(
        sampling.uniforms([9], [[1], [1], [2]], count), numbers[:, :count]
    )


def test_uniforms_stay_the_same_for_ever():
    steps = sampling.uniforms([7], [[0], [0]], 3) / STEP
    np.testing.assert_array_equal(steps, [[405788, 6898931, 785887], [2306835, 7473688, 2235273]])


@pytest.mark.parametrize(
    "name, options, rule",
    [
        ("Greedy", {}, Rule("greedy")),
        ("Random", {}, Rule("random")),
        ("Random", dict(temperature=0.5, seed=1), Rule("random", 0.5)),
        ("TopK", {}, Rule("random", k=5)),
        ("TopK", dict(k=9, temperature=2.0), Rule("random", 2.0, k=9)),
        ("TopP", {}, Rule("random", p=0.1)),
        ("TopP", dict(p=0.8, k=40, temperature=0.7), Rule("random", 0.7, k=40, p=0.8)),
        ("Beam", {}, None),
        ("Contrastive", {}, None),
    ],
)
def test_rules_of_samplers(name, options, rule):
    assert rule_of(getattr(keras_hub.samplers, f"{name}Sampler")(**options)) == rule


def test_no_rule_of_derived_samplers():
    class Forbidding(keras_hub.samplers.TopKSampler):
        pass

    assert rule_of(Forbidding(temperature=0)) is None
    assert rule_of("greedy") is None


RULES = [
    Rule("random"),
    Rule("random", 0.3),
    Rule("random", 4.0),
    Rule("random", 2.0, k=10),
    Rule("random", 2.0, p=0.6),
    Rule("random", 3.0, k=30, p=0.6),
    Rule("random", 3.0, k=30, p=0.99),
    Rule("random", 1.0, k=5, p=1.0),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_probabilities_follow_the_rule(call, rule):
    logits = random_logits(10, 200)
    scaled = logits.astype("float64") / rule.temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True)
    if rule.k is not None:
        expected[expected < np.sort(expected, axis=1)[:, [-rule.k]]] = 0
    if rule.p is not None:
        # Of the mass of all tokens, also of those that are not among the k.
        expected = np.array([most_likely_until(row, rule.p) for row in expected])
    found = call(lambda x: sampling.probabilities(x, rule), logits)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_probabilities_are_float32():
    logits = keras.ops.cast(random_logits(2, 50), "bfloat16")
    expected = to_numpy(keras.ops.softmax(keras.ops.cast(logits, "float32") / 0.7))
    found = sampling.probabilities(logits, Rule("random", 0.7))
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [
        ("Random", {}),
        ("TopK", dict(k=4)),
        ("TopP", dict(p=0.7)),
        ("TopP", dict(p=0.7, k=3)),
        ("TopP", dict(p=0.95, k=3)),
    ],
)
def test_same_frequencies_as_keras_hub(name, options):
    sampler = getattr(keras_hub.samplers, f"{name}Sampler")(seed=0, temperature=2.0, **options)
    logits = np.tile(random_logits(1, 8), (20_000, 1))
    theirs = to_numpy(
        sampler.get_next_token(sampler.compute_probabilities(keras.ops.convert_to_tensor(logits)))
    )
    ours = to_numpy(
        sampling.probabilities(keras.ops.convert_to_tensor(logits[:1]), rule_of(sampler))
    )[0]
    theirs = np.bincount(theirs, minlength=8) / 20_000
    np.testing.assert_array_equal(theirs > 0, ours > 0)
    np.testing.assert_allclose(theirs, ours / ours.sum(), atol=0.015)
