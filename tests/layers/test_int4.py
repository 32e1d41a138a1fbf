"""Int4 matrices against Keras's packing and the plain formula: (q - zero) * scale of each group."""

import keras
import numpy as np
import pytest
from common import gradients, to_numpy
from keras import ops

from keras_vaultgemma.layers import int4
from keras_vaultgemma.layers.int4 import Int4Matrix
from keras_vaultgemma.layers.projection import Projection

pytestmark = pytest.mark.first_backend

SHAPES = [
    pytest.param(15, 23, 7, marks=pytest.mark.every_backend),
    (16, 24, 8),
    (16, 23, None),
    (7, 9, 128),
]
"""Rows, columns and size of a group: some groups are not whole, some numbers of columns odd."""


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def quantized(axis, rows, columns, block):
    """Return an `Int4Matrix` and its values in floating point, computed without packing."""
    matrix = random(rows, columns)
    value = matrix if axis == 0 else matrix.T
    if block is None:
        q, scale = keras.quantizers.abs_max_quantize(
            value, axis=0, value_range=(-8, 7), dtype="int8", to_numpy=True
        )
        q, scale, zero = to_numpy(q), to_numpy(scale)[0], None
        expected = q / scale
    else:
        q, scale, zero = map(
            to_numpy,
            keras.quantizers.abs_max_quantize_grouped_with_zero_point(
                value, block_size=block, to_numpy=True
            ),
        )
        groups = np.arange(len(value)) // block
        expected = (q - zero[groups].astype("float32")) * scale[groups]
    if axis:
        q, expected, scale = q.T, expected.T, scale.T
        zero = None if zero is None else zero.T
    packed, _, _ = keras.quantizers.pack_int4(ops.convert_to_tensor(np.array(q)), axis=-1)
    tensors = [None if x is None else ops.convert_to_tensor(np.array(x)) for x in (scale, zero)]
    assert np.abs(expected - matrix).max() < 1
    return Int4Matrix(packed, *tensors, block, axis, columns), expected


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
@pytest.mark.parametrize("many_rows", [int4.MANY_ROWS, 1])
def test_matmul_and_gradient(monkeypatch, many_rows, rows, columns, block, axis):
    """By halves, and with the whole matrix, as many rows are multiplied."""
    monkeypatch.setattr(int4, "MANY_ROWS", many_rows)
    matrix, expected = quantized(axis, rows, columns, block)
    np.testing.assert_allclose(to_numpy(matrix.dense("float32")), expected, rtol=1e-5, atol=1e-6)
    for transposed, width in ((False, rows), (True, columns)):
        dense = expected.T if transposed else expected
        x, upstream = random(2, 3, width, seed=1), random(2, 3, dense.shape[1], seed=2)
        product = to_numpy(matrix.matmul(ops.convert_to_tensor(x), transposed))
        np.testing.assert_allclose(product, x @ dense, rtol=1e-4, atol=1e-5)
        variable = keras.Variable(x)
        (gradient,) = gradients(
            lambda variable=variable, transposed=transposed, upstream=upstream: ops.sum(
                matrix.matmul(variable * 1.0, transposed) * ops.convert_to_tensor(upstream)
            ),
            [variable],
        )
        np.testing.assert_allclose(gradient, upstream @ dense.T, rtol=1e-4, atol=1e-5)
    if axis:
        ids = np.array([[0, rows - 1, 2]], "int32")
        found = to_numpy(matrix.rows(ops.convert_to_tensor(ids), "float32"))
        np.testing.assert_allclose(found, expected[ids], rtol=1e-5, atol=1e-6)


def test_layers_agree_with_keras():
    layer = Projection(24, initializer_range=0.3, dtype="float32")
    layer.build((None, 16))
    layer.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=8), mode="int4")
    theirs = keras.layers.Dense(24, use_bias=False, dtype="float32")
    theirs.build((None, 16))
    theirs.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=8), mode="int4")
    for ours, other in zip(layer.weights, theirs.weights, strict=True):
        other.assign(ours)
    x = random(2, 16)
    np.testing.assert_allclose(to_numpy(layer(x)), to_numpy(theirs(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [8, 5])
def test_a_table_is_quantized_in_blocks_of_rows(monkeypatch, block):
    monkeypatch.setattr(int4, "ROWS", 7)
    table = random(24, 16)
    expected, _ = quantized(1, 24, 16, block)
    for found, one in zip(int4.quantize_rows(table, block), expected[:3], strict=True):
        np.testing.assert_allclose(found, to_numpy(one), rtol=1e-6)
