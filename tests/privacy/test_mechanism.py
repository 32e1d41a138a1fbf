"""The mechanism: every row is clipped on its own, and the sum changes by at most C without it."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from common import LINES, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from privacy_cases import (
    MODELS,
    C,
    distance,
    noise_of,
    plain_gradients,
    plain_sum,
    private_model,
    shared,
    some_rows,
    sum_of,
    take,
)

from keras_vaultgemma import backend
from keras_vaultgemma.privacy import mechanism

MODELS_WITH_CAPS_FIRST = [
    pytest.param(name, marks=[pytest.mark.first_backend] * ("caps" not in name)) for name in MODELS
]
"""The models, of which those with caps, which are more general, suffice on the other backends."""


@pytest.mark.parametrize("name", MODELS_WITH_CAPS_FIRST)
def test_equal_to_a_plain_loop_over_rows(monkeypatch, name):
    model, rows = shared(name), some_rows(7)
    found, losses = plain_gradients(model, rows)
    _, norms = plain_sum(found)
    # Four rows are below it, three above.
    clip_norm = float(np.mean(np.sort(norms)[3:5]))
    monkeypatch.setattr(model.private_training.settings, "clip_norm", clip_norm)
    expected, _ = plain_sum(found, clip_norm * (1 - mechanism.ROUNDING))
    for size in (1, 3):
        clipped = sum_of(model, rows, size=size)
        assert (clipped.clipped, clipped.not_finite) == (3, 0)
        np.testing.assert_allclose(clipped.loss, sum(losses), rtol=1e-5)
        for g, e in zip(clipped.gradients, expected, strict=True):
            np.testing.assert_allclose(g, e, atol=1e-5)


def test_the_sum_carries_its_sensitivity():
    model = private_model(**MODELS["LoRA"])
    clipped, _ = model.private_training.clipped_sum(
        keras.tree.map_structure(ops.convert_to_tensor, some_rows(1)), 1
    )
    assert clipped.sensitivity == C


@pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.first_backend), "LoRA"])
def test_rows_beyond_the_count_contribute_nothing(monkeypatch, name):
    monkeypatch.setattr(mechanism, "sum_rounding", lambda *sizes: 0.0)  # ρ depends on the capacity
    model, rows = private_model(**MODELS[name]), some_rows(6)  # a sum without ρ of its own
    for size in (1, 4):
        few, cut = (
            sum_of(model, take(rows, range(3)), size=size),
            sum_of(model, rows, count=3, size=size),
        )
        np.testing.assert_allclose(cut.loss, few.loss, rtol=1e-6)
        assert distance(cut.gradients, few.gradients) < 1e-6
        nothing = sum_of(model, rows, count=0, size=size)
        assert nothing.loss == 0 and all((g == 0).all() for g in nothing.gradients)


@pytest.mark.parametrize("name", MODELS_WITH_CAPS_FIRST)
def test_a_row_changes_the_sum_by_at_most_c(name):
    """The bound holds strictly, in float32, in 50 cases for each of 4 models."""
    model = shared(name)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 5))
    def check(seed, count, removed):
        rows, removed = some_rows(6, seed=seed), removed % count
        order = [*range(removed), *range(removed + 1, count), removed, *range(count, 6)]
        whole, without = sum_of(model, rows, count), sum_of(model, take(rows, order), count - 1)
        assert distance(whole.gradients, without.gradients) <= C
        assert whole.clipped - without.clipped in (0, 1)

    check()


def test_many_rows_in_the_same_direction():
    """Rounding in a long sum stays within the allowance."""
    model, rows = private_model(**MODELS["LoRA"], clip_norm=0.01), take(some_rows(1), [0] * 180)
    whole, without = sum_of(model, rows, 180, size=4), sum_of(model, rows, 179, size=4)
    assert 0.0099 < distance(whole.gradients, without.gradients) <= 0.01


def sum_of_numbers(numbers, count=None, size=1, rows=None):
    """`ClippedSum` of rows that are single numbers, with C = 1."""
    gradients = ops.convert_to_tensor(np.float32(numbers)[:, None])

    def function(gradients, count):
        def row_gradients(start, length, state):
            return [ops.slice(gradients, (start, 0), (length, 1))], ops.zeros((length,)), state

        sums, _ = mechanism.clipped_sum(
            row_gradients, [(1,)], count, rows or len(numbers), size, 1.0, [ops.zeros(())]
        )
        return sums.gradients[0], (sums.rests or [ops.zeros((1,))])[0]

    run = backend.compile_function(function, [], jit_compile=False)
    count = ops.convert_to_tensor(np.int32(len(numbers) if count is None else count))
    total, rest = map(to_numpy, run(gradients, count))
    return total[0], rest[0]


def adversarial_numbers(count):
    """Numbers, the first of which changes a sum that is rounded at every addition by far more than 1.

    Half of them bring the sum to a power of two: just above it with the first one, just below it without. Each of the
    others is so small that the larger sum, a multiple of 2 u, is rounded up, and the smaller one, a multiple of u, is
    exact.
    """
    half = count // 2
    power = 2.0 ** np.floor(np.log2(half * 0.9))
    numbers = [0.9, *[(power - 0.45) / half] * half]
    with_first, without = (
        np.cumsum(np.float32(part), dtype="float32")[-1] for part in (numbers, numbers[1:])
    )
    unit = np.float32(power * 2.0**-24)
    while len(numbers) < count:
        number = max((unit, 3 * unit), key=lambda x: (with_first + x) - (without + x))
        with_first, without = with_first + number, without + number
        numbers.append(number)
    return np.float32(numbers)


def test_adversarial_rounding_of_plain_sums():
    """The first row changes the sum by more than its own length, and by less than the allowance for 250 rows."""
    numbers = adversarial_numbers(250)
    change = sum_of_numbers(numbers)[0] - sum_of_numbers([0.0, *numbers[1:]])[0]
    assert 0.9 * (1 + 1e-5) < change < 0.9 * (1 + mechanism.sum_rounding(250, 1))


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("count", [2000, 4096])
def test_adversarial_rounding(count, size):
    """The first row changes the sum by its own length and by what rounding the sum once can change."""
    numbers = adversarial_numbers(count)
    whole, rest = sum_of_numbers(numbers, size=size)
    without, its_rest = sum_of_numbers([0.0, *numbers[1:]], size=size)
    exact = numbers.astype("float64").sum()
    assert abs(np.float64(whole) + np.float64(rest) - exact) < 8 * count**2 * 2.0**-48
    assert whole == np.float32(exact) and abs(rest) <= exact * 2.0**-24
    np.testing.assert_allclose(
        np.float64(whole) - without + (np.float64(rest) - its_rest), 0.9, rtol=1e-7
    )
    if count == 4096:  # in sequence, it is off by more
        naive, naive_without = (
            np.cumsum(part, dtype="float32")[-1] for part in (numbers, numbers[1:])
        )
        assert abs(naive - naive_without - 0.9) > 1e-4


@pytest.mark.parametrize("size", [16, 64])
def test_65536_rows_keep_their_length(size):
    """Long rows, in an order that rounds a plain sum at every addition, are clipped to 0.99 C or more, and add up."""
    count = 2**16
    signs = np.where(np.random.default_rng(0).random(count) < 0.9, 5.0, -5.0)
    total, rest = sum_of_numbers(signs, size=size)
    longest = (1 - mechanism.ROUNDING) / (1 + float(to_numpy(mechanism.sum_rounding(count, size))))
    assert 0.99 < longest < 1
    expected = np.float64(np.float32(longest)) * np.sign(signs).sum()
    np.testing.assert_allclose(np.float64(total) + np.float64(rest), expected, rtol=1e-6)


@pytest.mark.first_backend
@pytest.mark.parametrize("rows, size", [(1, 1), (128, 1), (1000, 1), (1000, 8), (65536, 8)])
def test_the_clipped_length_leaves_the_rounding_allowance(rows, size):
    """A lone long row has the norm C (1 - ROUNDING) / (1 + ρ), with ρ of the largest batch."""

    def row_gradients(start, length, state):
        return [ops.full((length, 4), 5.0)], ops.zeros((length,)), state

    sums, _ = mechanism.clipped_sum(
        row_gradients, [(4,)], ops.convert_to_tensor(np.int32(1)), rows, size, C, [ops.zeros(())]
    )
    norm = np.linalg.norm(to_numpy(sums.gradients[0]).astype("float64"))
    allowance = 1 + float(to_numpy(mechanism.sum_rounding(rows, size)))
    np.testing.assert_allclose(norm, C * (1 - mechanism.ROUNDING) / allowance, rtol=1e-6)
    assert sums.sensitivity == C


@pytest.mark.first_backend
@pytest.mark.parametrize("rows, size", [(1, 1), (128, 1), (250, 1), (7, 3), (64, 8)])
def test_the_rounding_allowance_of_plain_sums_counts_every_addition(rows, size):
    """ρ is twice the sum over all rows of the additions that each goes through, in any order within a microbatch.

    After whole microbatches, size - 1 rows may be added one by one.
    """
    assert not mechanism.needs_pairs(rows, size)
    microbatches = -(-rows // size)
    most = 2 * (size - 1)
    additions = sum(most + microbatches - j for j in range(microbatches) for _ in range(size))
    deepest = most + microbatches
    np.testing.assert_allclose(
        mechanism.sum_rounding(rows, size),
        2 * additions * 2.0**-24 / (1 - deepest * 2.0**-24),
        rtol=1e-5,
    )


@pytest.mark.first_backend
@pytest.mark.parametrize("devices", [2, 8, 64])
@pytest.mark.parametrize("rows, size", [(6, 1), (64, 1), (250, 1), (64, 4)])
def test_the_rounding_allowance_covers_the_additions_between_devices(rows, size, devices):
    """Each device adds its microbatches; at most D - 1 additions follow. Most often one device adds as much."""
    microbatches = -(-rows // (size * devices))
    assert not mechanism.needs_pairs(rows, size, devices)
    additions = [2 * size + microbatches - j + devices - 3 for j in range(microbatches)]
    needed = 2 * 2.0**-24 * sum(additions) * size * devices
    alone, found = (mechanism.sum_rounding(rows, size, number) for number in (1, devices))
    assert float(to_numpy(found)) >= needed
    if rows >= 2 * size * devices:
        assert found == alone


@pytest.mark.first_backend
@pytest.mark.parametrize("rows, size", [(1000, 1), (1000, 8), (65536, 1), (65536, 64)])
def test_the_rounding_allowance_of_pairs(rows, size):
    """Twice one rounding of the total, n u, and of all roundings within pairs, 8 (n u)^2."""
    expected = 2 * (rows * 2.0**-24 + 8 * (rows * 2.0**-24) ** 2)
    for count in (rows, ops.convert_to_tensor(rows)):
        assert mechanism.needs_pairs(count, size)
        found = float(to_numpy(mechanism.sum_rounding(count, size)))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.first_backend
@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
def test_rows_keep_99_percent_of_the_clipping_norm(size):
    for rows in (1, 2, 100, 250, 256, 300, 1000, 4096, 16384, 65536):
        allowance = 1 + float(to_numpy(mechanism.sum_rounding(rows, size)))
        assert (1 - mechanism.ROUNDING) / allowance >= 0.99


@pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.first_backend), "LoRA"])
def test_bfloat16_is_equal_to_a_plain_loop_over_rows(name):
    """Gradients are computed in bfloat16 and compared with Keras's own loss; norms and sums are float32."""
    model, rows = private_model(**MODELS[name], dtype="mixed_bfloat16"), some_rows(7)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    found, losses = plain_gradients(model, rows)
    _, norms = plain_sum(found)
    model.private_training.settings.clip_norm = clip_norm = float(np.mean(np.sort(norms)[3:5]))
    expected, _ = plain_sum(found, clip_norm * (1 - mechanism.ROUNDING))
    length = np.sqrt(sum((e**2).sum() for e in expected))
    for size in (1, 3):
        clipped = sum_of(model, rows, size=size)
        assert (clipped.clipped, clipped.not_finite) == (3, 0)
        np.testing.assert_allclose(clipped.loss, sum(losses), rtol=0.02)
        assert distance(clipped.gradients, expected) < 0.02 * length
        assert {g.dtype for g in clipped.gradients} == {np.dtype("float32")}
        # The norm of each clipped row is the smaller of C and its own norm.
        for i in range(7):
            alone = sum_of(model, take(rows, [i]), size=size).gradients
            norm = np.sqrt(sum((g.astype("float64") ** 2).sum() for g in alone))
            assert norm <= clip_norm and (norms[i] < clip_norm or norm > 0.998 * clip_norm)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(pytest.param("LoRA", size, marks=pytest.mark.first_backend) for size in (1, 3)),
        ("full", 3),
    ],
)
def test_a_row_that_is_not_finite_contributes_nothing_and_is_counted(name, size):
    """It is the first row of its microbatch, with a weight that overflows, and the rows next to it are unchanged."""
    model, (x, y, weight) = shared(name), some_rows(6)
    rows = (x, y, weight.astype("float32"))
    finite = sum_of(model, take(rows, range(1, 6)), size=1)
    rows[2][0, 0] = np.inf
    both = sum_of(model, rows, size=size)
    assert both.not_finite == 1 and max(np.abs(g).max() for g in both.gradients) > 0
    assert distance(both.gradients, finite.gradients) < 1e-5
    np.testing.assert_allclose(both.loss, finite.loss, rtol=1e-5)


def test_clip_factors():
    x = np.array([[3.0, 4.0], [0.3, 0.4], [0, 0], [np.nan, 1], [np.inf, 1], [3.0, 4.0]], "float32")
    losses, present = np.array([1, 1, 1, 1, 1, 1], "float32"), np.array([True] * 5 + [False])
    arrays = [ops.convert_to_tensor(a) for a in (x[:, :1], x[:, 1:], losses, present)]
    factors, is_finite, norms = map(to_numpy, mechanism.clip_factors(arrays[:2], *arrays[2:], 1.0))
    np.testing.assert_allclose(factors, [(1 - mechanism.ROUNDING) / 5, 1, 1, 0, 0, 0], rtol=1e-6)
    assert is_finite.tolist() == [True, True, True, False, False, False]
    np.testing.assert_allclose(norms[:3], [5, 0.5, 0], rtol=1e-6)
    losses[1] = np.nan
    factors, is_finite, _ = map(
        to_numpy, mechanism.clip_factors(arrays[:2], ops.convert_to_tensor(losses), arrays[3], 1.0)
    )
    assert factors[1] == 0 and not is_finite[1]


@pytest.mark.parametrize(
    "shape", [(2, 3 * mechanism.STAGE + 5), (2, 2 * mechanism.STAGE, 3), (2, 7), (2,)]
)
def test_norms_of_long_variables(shape):
    """One value of 2^13 and millions of ones, which a float32 sum in sequence would lose."""
    x = np.ones(shape, "float32")
    x.reshape(2, -1)[:, 0] = 2.0**13
    found = to_numpy(mechanism._squared_norms(ops.convert_to_tensor(x)))
    expected = (x.reshape(2, -1).astype("float64") ** 2).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_the_standard_deviation_of_the_noise():
    shape, expected = (300, 400), 8.0
    clipped = mechanism.ClippedSum([ops.zeros(shape), ops.ones((5,))], C, 0.0, 0.0, 0.0)
    seeds = np.random.default_rng(0).integers(-(2**31), 2**31, (2, 4)).astype("int32")
    noised, small = map(
        to_numpy, mechanism.noised_mean(clipped, 1.3, ops.convert_to_tensor(seeds), expected)
    )
    deviation = 1.3 * C / expected
    np.testing.assert_allclose(noised.std(), deviation, rtol=0.01)
    assert abs(noised.mean()) < 4 * deviation / noised.size**0.5
    noise = noise_of(seeds[1], (5,))
    np.testing.assert_allclose(small, (1 + 1.3 * C * noise) / expected, rtol=1e-5)


@pytest.mark.skipif(backend.NAME != "jax", reason="jax-privacy is for JAX")
@pytest.mark.parametrize("name", [pytest.param("full, both caps", marks=pytest.mark.long), "LoRA"])
def test_equal_to_jax_privacy(name):
    clipping = pytest.importorskip("jax_privacy.clipping")
    model, (x, y, weight) = shared(name), some_rows(6)
    fixed = [(v, v.value) for v in model.non_trainable_variables]

    def loss(values, rows):
        x, y, weight = keras.tree.map_structure(lambda array: array[None], rows)
        with keras.StatelessScope([*fixed, *zip(model.trainable_variables, values, strict=True)]):
            logits = model.logits(model.backbone(x))
        each = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        return ops.sum(each * weight) / ops.sum(weight)

    gradient = clipping.clipped_grad(
        loss, l2_clip_norm=C * (1 - mechanism.ROUNDING), batch_argnums=1, keep_batch_dim=False
    )
    expected = gradient(
        [v.value for v in model.trainable_variables], (x, y, weight.astype("float32"))
    )
    for g, e in zip(sum_of(model, (x, y, weight)).gradients, expected, strict=True):
        np.testing.assert_allclose(g, to_numpy(e), atol=1e-5)


DUMP = """
import sys
import keras, numpy as np
from keras_vaultgemma import VaultGemmaCausalLM, privacy
model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
model.preprocessor.sequence_length = 32
rows = keras.utils.unpack_x_y_sample_weight(model.preprocessor(sys.argv[2:]))
rows, found = keras.tree.map_structure(keras.ops.convert_to_tensor, rows), []
for microbatch in (1, 2):
    if microbatch == 2:
        model.backbone.enable_lora(4)
        for v in model.trainable_variables:
            v.assign(np.random.default_rng(sum(map(ord, v.path))).normal(0, 0.02, v.shape))
    model.compile(keras.optimizers.SGD(1.0), privacy=privacy.DPSGD(noise_multiplier=1.0, clip_norm=0.5))
    model.private_training.microbatch = microbatch
    clipped, _ = model.private_training.clipped_sum(rows, keras.ops.convert_to_tensor(np.int32(len(sys.argv) - 2)))
    found += [keras.ops.convert_to_numpy(g.detach() if hasattr(g, "detach") else g) for g in clipped.gradients]
np.savez(sys.argv[1], *found)
"""


@pytest.mark.long
@pytest.mark.skipif(backend.NAME != "jax", reason="the test itself runs all three backends")
def test_three_backends_agree(tmp_path):
    """On the sum of all weights' gradients, one row at a time, and on that of LoRA factors, two at a time."""
    found = []
    for name in backend.BACKENDS:
        path = tmp_path / f"{name}.npz"
        command = [sys.executable, "-c", DUMP, str(path), *LINES]
        subprocess.run(command, env={**os.environ, "KERAS_BACKEND": name}, check=True)
        found.append([*np.load(path).values()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)
