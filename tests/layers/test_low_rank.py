"""Low-rank updates against the dense formula x (W + s A B): values and gradients, for every base."""

import keras
import numpy as np
import pytest
from common import gradients, shapes_made, to_numpy
from keras import ops

from keras_vaultgemma.layers.low_rank import low_rank_matmul
from keras_vaultgemma.layers.projection import Projection
from keras_vaultgemma.layers.reversible_embedding import ReversibleEmbedding

RANK, ALPHA = 3, 6.0
BASES = [
    ("float32", None),
    ("bfloat16", None),
    ("mixed_bfloat16", None),
    ("float32", "int8"),
    ("bfloat16", "int8"),
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "mixed_bfloat16": 2e-2}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def adapted(layer, mode):
    """Return the layer with random factors, its base matrix and the factors, in float32."""
    if mode:
        layer.quantize(mode)
    (weight, *scale) = [to_numpy(variable.value).astype("float32") for variable in layer.weights]
    if scale:  # of each row of an embedding, of each column of a projection
        weight = weight / (
            scale[0][:, None] if isinstance(layer, ReversibleEmbedding) else scale[0]
        )
    elif isinstance(layer, Projection):
        weight = weight.T
    layer.enable_lora(RANK, lora_alpha=ALPHA)
    for i, variable in enumerate(layer.lora_factors):
        variable.assign(random(*variable.shape, seed=i + 1))
        assert variable.dtype == "float32" and variable.trainable
    a, b = map(to_numpy, layer.lora_factors)
    return weight, a, b


def adapted_projection(dtype="float32", mode=None):
    layer = Projection(24, initializer_range=0.3, dtype=dtype, name="p")
    layer.build((None, None, 16))
    return layer, *adapted(layer, mode)


def adapted_embedding(dtype="float32", mode=None):
    layer = ReversibleEmbedding(
        24, 16, embeddings_initializer=keras.initializers.RandomNormal(stddev=0.3), dtype=dtype
    )
    layer.build()
    return layer, *adapted(layer, mode)


def check(found, expected, tolerance):
    """Compare within `tolerance` of the largest value, which bounds the error of 16-bit sums."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one.astype("float32"), other, atol=tolerance * np.abs(other).max()
        )


def weighted_sum(output, upstream):
    return ops.sum(ops.multiply(ops.cast(output, "float32"), ops.convert_to_tensor(upstream)))


@pytest.mark.parametrize(("dtype", "mode"), BASES)
def test_projection(dtype, mode):
    layer, weight, a, b = adapted_projection(dtype, mode)
    x, upstream = (
        keras.Variable(random(2, 5, 16), dtype=layer.compute_dtype),
        random(2, 5, 24, seed=9),
    )
    rows, rows_upstream = to_numpy(x).astype("float32").reshape(-1, 16), upstream.reshape(-1, 24)
    scale = ALPHA / RANK
    output = layer(x * 1)
    assert keras.backend.standardize_dtype(output.dtype) == layer.compute_dtype
    merged = weight + scale * a @ b
    tolerance = TOLERANCE[dtype]
    check([to_numpy(output).reshape(-1, 24)], [rows @ merged], max(tolerance, 2e-2 if mode else 0))

    dx, da, db = gradients(lambda: weighted_sum(layer(x * 1), upstream), [x, *layer.lora_factors])
    check(
        [dx.reshape(-1, 16), da, db],
        [
            rows_upstream @ merged.T,
            scale * rows.T @ (rows_upstream @ b.T),
            scale * (rows @ a).T @ rows_upstream,
        ],
        tolerance,
    )


@pytest.mark.parametrize(("dtype", "mode"), BASES)
def test_rows_of_the_embedding(dtype, mode):
    layer, weight, a, b = adapted_embedding(dtype, mode)
    ids, upstream = np.array([[0, 23, 5], [5, 7, 23]]), random(2, 3, 16, seed=9)
    scale = ALPHA / RANK
    tolerance = TOLERANCE[dtype]
    check([to_numpy(layer(ids))], [(weight + scale * a @ b)[ids]], tolerance)

    rows = np.zeros((24, 16), "float32")
    np.add.at(rows, ids.reshape(-1), upstream.reshape(-1, 16))
    found = gradients(lambda: weighted_sum(layer(ids), upstream), list(layer.lora_factors))
    check(found, [scale * rows @ b.T, scale * a.T @ rows], tolerance)


@pytest.mark.parametrize(("dtype", "mode"), BASES)
def test_embedding_in_reverse(dtype, mode):
    layer, weight, a, b = adapted_embedding(dtype, mode)
    x, upstream = (
        keras.Variable(random(2, 5, 16), dtype=layer.compute_dtype),
        random(2, 5, 24, seed=9),
    )
    rows, rows_upstream = to_numpy(x).astype("float32").reshape(-1, 16), upstream.reshape(-1, 24)
    scale = ALPHA / RANK
    merged = weight + scale * a @ b
    tolerance = TOLERANCE[dtype]
    logits = to_numpy(layer(x * 1, reverse=True)).reshape(-1, 24)
    check([logits], [rows @ merged.T], max(tolerance, 2e-2 if mode else 0))

    dx, da, db = gradients(
        lambda: weighted_sum(layer(x * 1, reverse=True), upstream), [x, *layer.lora_factors]
    )
    check(
        [dx.reshape(-1, 16), da, db],
        [
            rows_upstream @ merged,
            scale * rows_upstream.T @ (rows @ b.T),
            scale * (rows_upstream @ a).T @ rows,
        ],
        tolerance,
    )


def test_soft_cap_comes_after_the_update():
    layer = ReversibleEmbedding(24, 16, logit_soft_cap=2.0)
    layer.build()
    weight, a, b = adapted(layer, None)
    x = random(2, 5, 16)
    expected = 2 * np.tanh(x @ (weight + ALPHA / RANK * a @ b).T / 2)
    np.testing.assert_allclose(to_numpy(layer(x, reverse=True)), expected, atol=1e-5)


def test_low_rank_matmul_in_both_layouts():
    x, a, b = random(2, 5, 7), random(7, 3, seed=1), random(3, 4, seed=2)
    expected = x @ a @ b * 0.5
    np.testing.assert_allclose(
        to_numpy(low_rank_matmul(x, a, b, 0.5)), expected, rtol=1e-4, atol=1e-5
    )
    transposed = low_rank_matmul(x, a.T.copy(), b.T.copy(), 0.5, transposed=True)
    np.testing.assert_allclose(to_numpy(transposed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_of_the_factors_is_never_computed(transposed):
    """Neither in the output nor in its gradients, because it is as large as the adapted matrix."""
    shapes = {"x": (5, 20), "a": (20, 3), "b": (3, 28)}
    x, a, b = (random(*shape) for shape in shapes.values())
    first, second = (a.T, b.T) if transposed else (a, b)

    def total(x, first, second):
        return ops.sum(ops.square(low_rank_matmul(x, first, second, 2.0, transposed)))

    made = shapes_made(total, x, np.ascontiguousarray(first), np.ascontiguousarray(second))
    assert {(5, 3), (5, 28)} <= made
    assert not {(20, 28), (28, 20)} & made


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_factors_are_not_rounded_to_the_compute_dtype(dtype):
    layer = Projection(1, initializer_range=0.0, dtype=dtype, name="p")
    layer.build((None, 1))
    layer.enable_lora(2)
    for variable, value in zip(
        layer.lora_factors, ([[1.0, -1.0]], [[1 + 2**-10], [1.0]]), strict=True
    ):
        variable.assign(value)
    assert float(to_numpy(layer(np.ones((1, 1), "float32")))[0, 0]) == 2**-10


def test_dropout_is_on_the_adapters_input_in_training_alone():
    layer, weight, a, b = adapted_projection()
    layer.disable_lora()
    layer.enable_lora(RANK, lora_alpha=ALPHA, dropout=0.5)
    for variable, value in zip(layer.lora_factors, (a, b), strict=True):
        variable.assign(value)
    x = np.zeros((1, 400, 16), "float32")
    x[..., 3] = 1  # each row has one channel, which is dropped or doubled
    update = ALPHA / RANK * (a @ b)[3]
    np.testing.assert_allclose(
        to_numpy(layer(x)), np.broadcast_to(weight[3] + update, (1, 400, 24)), rtol=1e-4
    )
    first, second = (to_numpy(layer(x, training=True))[0] for _ in range(2))
    dropped = np.isclose(first, weight[3], atol=1e-5).all(axis=1)
    doubled = np.isclose(first, weight[3] + 2 * update, atol=1e-4).all(axis=1)
    assert (dropped ^ doubled).all() and 140 < dropped.sum() < 260
    assert not np.array_equal(first, second)


def test_disabling_leaves_the_frozen_matrix():
    layer, weight, _, _ = adapted_projection()
    before = [variable.path for variable in layer.variables]
    layer.disable_lora()
    assert len(before) == 3 and [variable.path for variable in layer.variables] == ["p/weight"]
    assert (
        layer.trainable_variables == []
        and not layer.lora_enabled
        and "lora_rank" not in layer.get_config()
    )
    np.testing.assert_array_equal(to_numpy(layer.kernel), weight)
    x = random(2, 16)
    np.testing.assert_allclose(to_numpy(layer(x)), x @ weight, rtol=1e-4, atol=1e-5)
    layer.enable_lora(1)
    assert sorted(v.path for v in layer.variables) == sorted(before)


@pytest.mark.parametrize("make", [adapted_projection, adapted_embedding])
def test_merged_matrix_is_rounded_once(make):
    layer, weight, a, b = make("bfloat16")
    merged = layer.kernel if hasattr(layer, "kernel") else layer.embeddings
    assert keras.backend.standardize_dtype(merged.dtype) == "bfloat16"
    expected = weight + ALPHA / RANK * a @ b
    error = np.abs(to_numpy(merged).astype("float32") - expected)
    assert (error <= 2**-8 * np.abs(expected) + 1e-6).all()


def test_merged_matrix_of_a_mixed_policy_is_float32():
    layer, weight, a, b = adapted_projection("mixed_bfloat16")
    np.testing.assert_allclose(
        to_numpy(layer.kernel), weight + ALPHA / RANK * a @ b, rtol=1e-5, atol=1e-6
    )


def test_other_quantized_bases_are_rejected():
    layer = Projection(24, initializer_range=0.3, dtype="float32", name="p")
    layer.build((None, 16))
    layer.quantize("float8")
    message = "base in floating point, int8 or int4. Received: p in float8"
    with pytest.raises(ValueError, match=message):
        layer.enable_lora(2)
    layer = adapted_projection()[0]
    with pytest.raises(ValueError, match=message):
        layer.quantize("float8")
