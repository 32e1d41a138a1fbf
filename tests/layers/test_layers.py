import keras
import numpy as np
import pytest
import reference
from common import to_numpy
from keras import ops

from keras_vaultgemma.layers import int8
from keras_vaultgemma.layers.projection import Projection
from keras_vaultgemma.layers.reversible_embedding import ReversibleEmbedding
from keras_vaultgemma.layers.rms_norm import RMSNorm
from keras_vaultgemma.layers.rotary import RotaryAngles, rotate
from keras_vaultgemma.layers.soft_cap import soft_cap


def test_rms_norm_multiplies_by_one_plus_scale():
    norm = RMSNorm(epsilon=1e-3)
    x = np.array([[3.0, -4.0], [0.0, 0.0]], "float32")
    norm.build(x.shape)
    norm.scale.assign([0.5, -0.5])
    rms = np.sqrt(12.5 + 1e-3)
    np.testing.assert_allclose(
        to_numpy(norm(x)), [[3 / rms * 1.5, -4 / rms * 0.5], [0, 0]], rtol=1e-6
    )


def test_rms_norm_computes_in_float32():
    norm = RMSNorm(dtype="bfloat16")
    norm.build((None, 512))
    # The sum of 512 squares of 1.25 is beyond the 8 bits of bfloat16.
    x = keras.ops.full((1, 512), 1.25, dtype="bfloat16")
    assert keras.backend.standardize_dtype(norm(x).dtype) == "bfloat16"
    np.testing.assert_array_equal(to_numpy(keras.ops.cast(norm(x), "float32")), 1.0)


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rotation_equals_the_written_out_one(theta):
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype("float32")
    positions = np.array([[0, 1, 2], [7, 100, 1000]], "int32")
    rotated = to_numpy(rotate(keras.ops.convert_to_tensor(x), *RotaryAngles(8, theta)(positions)))
    for b, t, n in np.ndindex(2, 3, 2):
        expected = reference.rotate(x[b, t, n].astype("float64"), positions[b, t], theta)
        # Angles near 1000 radians have an error of 3e-5 in float32.
        np.testing.assert_allclose(
            rotated[b, t, n], expected, atol=1e-4 if positions[b, t] == 1000 else 1e-5
        )


def test_rotation_of_position_0_changes_nothing():
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 8)).astype("float32")
    np.testing.assert_array_equal(
        to_numpy(rotate(keras.ops.convert_to_tensor(x), *RotaryAngles(8, 1e4)(np.array([[0]])))), x
    )


def test_angles_stay_float32_under_a_bfloat16_policy():
    cos, _ = RotaryAngles(8, 10_000.0, dtype="float32")(np.array([[257]], "int32"))
    np.testing.assert_allclose(to_numpy(cos)[0, 0, 0, 0], np.cos(257.0), atol=1e-6)


def test_soft_cap():
    x = np.array([0.0, 1.0, -1000.0], "float32")
    np.testing.assert_allclose(
        to_numpy(soft_cap(keras.ops.convert_to_tensor(x), 5.0)), 5 * np.tanh(x / 5), rtol=1e-6
    )
    assert soft_cap(x, None) is x


def test_projections_of_one_shape_have_different_initial_values():
    first, second = (Projection(4, initializer_range=0.1, name=name) for name in "ab")
    for layer in (first, second):
        layer.build((None, 4))
    assert not np.array_equal(to_numpy(first.kernel), to_numpy(second.kernel))
    assert first.bias is None


@pytest.mark.parametrize(("mode", "tolerance"), [("int8", 0.03), ("int4", 0.15), ("float8", 0.1)])
def test_quantizing_transposes_the_matrix_for_keras(mode, tolerance):
    layer = Projection(24, initializer_range=0.1, dtype="float32", name="a")
    layer.build((None, None, 16))
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype("float32")
    expected = to_numpy(layer(x))
    with pytest.raises(ValueError):
        layer.quantize("no_such_mode")
    np.testing.assert_array_equal(to_numpy(layer(x)), expected)
    layer.quantize(mode)
    assert layer.weight is None and layer.weights[0].path == "a/kernel"
    np.testing.assert_allclose(
        to_numpy(layer(x)), expected, atol=tolerance * np.abs(expected).max()
    )


def test_quantized_matmuls_equal_those_of_keras():
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.normal(size=(2, 3, 16)).astype("float32"),
        rng.normal(size=(16, 24)).astype("float32"),
    )
    ours, theirs = (
        Projection(24, initializer_range=0.1, dtype="float32", name="a"),
        keras.layers.Dense(24, use_bias=False),
    )
    for layer in (ours, theirs):
        layer.build((None, None, 16))
    ours.weight.assign(kernel.T)
    theirs.kernel.assign(kernel)
    for layer in (ours, theirs):
        layer.quantize("int8")
    np.testing.assert_allclose(to_numpy(ours(x)), to_numpy(theirs(x)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_numpy(ours(x)), x @ kernel, atol=0.2)

    embeddings = kernel.T
    ours = ReversibleEmbedding(24, 16, logit_soft_cap=3.0)
    theirs = keras.layers.ReversibleEmbedding(24, 16, logit_soft_cap=3.0)
    for layer in (ours, theirs):
        layer.build()
        layer.embeddings.assign(embeddings)
    np.testing.assert_allclose(
        to_numpy(ours(x, reverse=True)), to_numpy(theirs(x, reverse=True)), rtol=1e-5
    )
    for layer in (ours, theirs):
        layer.quantize("int8")
    ids = np.array([[0, 5, 23]])
    np.testing.assert_allclose(to_numpy(ours(ids)), to_numpy(theirs(ids)), rtol=1e-6)
    np.testing.assert_allclose(
        to_numpy(ours(x, reverse=True)), to_numpy(theirs(x, reverse=True)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_matrices_are_rounded_as_keras_rounds_them(dtype, axis):
    """With a column and a row of zeros, in several blocks of rows."""
    matrix = np.random.default_rng(0).normal(size=(1500, 517))
    if dtype != "float16":
        matrix[:, 3] = matrix[700] = 0
    matrix = ops.cast(ops.convert_to_tensor(matrix), dtype)
    expected = keras.quantizers.AbsMaxQuantizer(axis=axis)(matrix, to_numpy=True)
    for found, one in zip(int8.BlockQuantizer(axis=axis)(matrix), expected, strict=True):
        found, one = to_numpy(ops.convert_to_tensor(found)), to_numpy(one)
        assert found.dtype == one.dtype
        np.testing.assert_array_equal(found, one)


def test_zeros_in_float16_are_rounded_to_zeros():
    """Keras's epsilon is 0 in float16, and 0 times the infinite scale would be NaN."""
    zeros = ops.zeros((2, 3), "float16")
    rounded, scale = int8.BlockQuantizer(axis=-1)(zeros)
    assert not rounded.any() and np.isfinite(scale).all()
