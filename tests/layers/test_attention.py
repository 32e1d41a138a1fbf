import itertools

import keras
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma.layers.attention import attend, causal_mask, segment_positions

_ = 0


def mask_of(query, key, window=None):
    return (
        to_numpy(causal_mask(np.array([query], "int32"), np.array([key], "int32"), window))
        .astype(int)[0]
        .tolist()
    )


def test_mask_is_causal():
    assert mask_of([0, 1, 2], [0, 1, 2]) == [
        [1, _, _],
        [1, 1, _],
        [1, 1, 1],
    ]


def test_window_counts_the_query_itself():
    assert mask_of([0, 1, 2, 3], [0, 1, 2, 3], window=2) == [
        [1, _, _, _],
        [1, 1, _, _],
        [_, 1, 1, _],
        [_, _, 1, 1],
    ]


def test_no_query_attends_to_padding():
    assert mask_of([-1, 0, 1], [-1, 0, 1]) == [
        [_, _, _],
        [_, 1, _],
        [_, 1, 1],
    ]


def test_slots_and_positions_may_differ():
    """A cache of 6 slots: a prompt of 2 tokens padded to 4, then one generated token; the last slot is empty."""
    assert mask_of([2], [0, 1, -1, -1, 2, -1]) == [[1, 1, _, _, 1, _]]
    assert mask_of([2], [0, 1, -1, -1, 2, -1], window=2) == [[_, 1, _, _, 1, _]]


def test_segments_do_not_attend_to_each_other():
    segments = np.array([[1, 1, 1, 2, 2, 3, 0]], "int32")
    positions = segment_positions(segments)

    def mask_of(window=None):
        return to_numpy(causal_mask(positions, positions, window, segments)).astype(int)[0].tolist()

    assert mask_of() == [
        [1, _, _, _, _, _, _],
        [1, 1, _, _, _, _, _],
        [1, 1, 1, _, _, _, _],
        [_, _, _, 1, _, _, _],
        [_, _, _, 1, 1, _, _],
        [_, _, _, _, _, 1, _],
        [_, _, _, _, _, _, _],
    ]
    assert mask_of(window=2) == [
        [1, _, _, _, _, _, _],
        [1, 1, _, _, _, _, _],
        [_, 1, 1, _, _, _, _],
        [_, _, _, 1, _, _, _],
        [_, _, _, 1, 1, _, _],
        [_, _, _, _, _, 1, _],
        [_, _, _, _, _, _, _],
    ]


def test_a_row_that_is_one_text_is_masked_as_without_segments():
    """For every mask of six tokens, also with gaps: positions count tokens, and the mask is the same."""
    masks = np.array([*itertools.product([0, 1], repeat=6)], "int32")
    positions = segment_positions(masks)
    assert to_numpy(positions).tolist() == np.where(masks, masks.cumsum(1) - 1, -1).tolist()
    for window in (None, 3):
        expected = to_numpy(causal_mask(positions, positions, window))
        np.testing.assert_array_equal(
            to_numpy(causal_mask(positions, positions, window, masks)), expected
        )


@pytest.mark.parametrize(
    "mask, positions",
    [
        ([1, 1, 1], [0, 1, 2]),
        ([1, 1, 0], [0, 1, -1]),
        ([0, 1, 1], [-1, 0, 1]),
        ([0, 0, 0], [-1, -1, -1]),
        ([1, 1, 2, 2, 2, 3, 0], [0, 1, 0, 1, 2, 0, -1]),
        ([0, 1, 2, 2], [-1, 0, 0, 1]),
        ([True, True, False], [0, 1, -1]),
    ],
)
def test_positions_of_padded_rows(mask, positions):
    found = segment_positions(np.array([mask]))
    assert keras.backend.standardize_dtype(found.dtype) == "int32"
    assert to_numpy(found).tolist() == [positions]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attend_equals_a_loop(cap, length, heads):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, length, 4, 8)).astype("float32")
    key, value = rng.normal(size=(2, 2, heads, 5, 8)).astype("float32")
    mask = rng.random((2, length, 5)) < 0.5
    mask[:, :, 0] = True
    expected = np.zeros_like(query)
    for b, t, n in np.ndindex(2, length, 4):
        seen, head = mask[b, t], n // (4 // heads)
        scores = key[b, head, seen] @ query[b, t, n] * 0.7
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores)
        expected[b, t, n] = weights @ value[b, head, seen] / weights.sum()
    for shape in ((2, heads, 5, 8), (2 * heads, 5, 8)):
        arrays = (query, key.reshape(shape), value.reshape(shape), mask)
        found = attend(*map(keras.ops.convert_to_tensor, arrays), scale=0.7, cap=cap)
        np.testing.assert_allclose(to_numpy(found), expected, atol=1e-6)


def test_a_query_without_keys_stays_finite():
    query, key = np.ones((1, 1, 2, 4), "float32"), np.ones((1, 1, 3, 4), "float32")
    value = np.arange(12, dtype="float32").reshape(1, 1, 3, 4)
    arrays = [
        keras.ops.convert_to_tensor(x) for x in (query, key, value, np.zeros((1, 1, 3), bool))
    ]
    np.testing.assert_allclose(
        to_numpy(attend(*arrays, scale=1.0))[0, 0, 0], value.mean((0, 1, 2)), rtol=1e-6
    )


def test_branches_of_a_segment_attend_to_its_trunk_and_not_to_each_other():
    """A text of 2 tokens with branches of 2 and 1, then one of 1 token with a branch."""
    positions = np.array([[0, 1, 2, 3, 2, 0, 1, -1]], "int32")
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]], "int32")
    branches = np.array([[0, 0, 1, 1, 2, 0, 1, 0]], "int32")
    mask = causal_mask(positions, positions, segments=segments, branches=branches)
    assert to_numpy(mask).astype(int)[0].tolist() == [
        [1, _, _, _, _, _, _, _],
        [1, 1, _, _, _, _, _, _],
        [1, 1, 1, _, _, _, _, _],
        [1, 1, 1, 1, _, _, _, _],
        [1, 1, _, _, 1, _, _, _],
        [_, _, _, _, _, 1, _, _],
        [_, _, _, _, _, 1, 1, _],
        [_, _, _, _, _, _, _, _],
    ]
