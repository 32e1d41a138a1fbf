import numpy as np
import pytest

from keras_vaultgemma.data.token_ids import (
    check_ids,
    check_lengths,
    columns_in_use,
    first_columns,
    pad_rows,
    unpad_rows,
)

pytestmark = pytest.mark.any_backend


def test_pad_and_truncate():
    token_ids, mask = pad_rows([[5, 6], [7, 8, 9, 10], []], 3, pad_id=1)
    assert token_ids.tolist() == [[5, 6, 1], [7, 8, 9], [1, 1, 1]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert token_ids.dtype == mask.dtype == np.int32


def test_unpad_takes_padding_on_either_side():
    assert unpad_rows([[5, 6, 0], [0, 7, 8]], [[1, 1, 0], [0, 1, 1]]) == [[5, 6], [7, 8]]


@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_unpad_with_wrong_shapes(shape):
    with pytest.raises(
        ValueError, match=r"must both have the shape \[batch, length\]. Received: \(2, 3\)"
    ):
        unpad_rows(np.zeros((2, 3)), np.zeros(shape))


@pytest.mark.parametrize("wrong", [-1, 10])
def test_range(wrong):
    check_ids([0, 9], 10)
    with pytest.raises(ValueError, match=f"from 0 to 9. Received: {wrong}"):
        check_ids([[0, wrong]], 10)
    with pytest.raises(ValueError, match=f"^Labels must be from 0 to 9. Received: {wrong}"):
        check_ids([[0, wrong]], 10, "Labels")


def test_lengths():
    check_lengths([[1, 2], [3]], 2)
    with pytest.raises(ValueError, match="max_length=2 tokens.*Received: 3 tokens in prompt 1"):
        check_lengths([[1, 2], [3, 4, 5]], 2)


@pytest.mark.parametrize(
    "length, total, columns",
    [(1, 512, 16), (16, 512, 16), (17, 512, 24), (100, 512, 128), (385, 512, 512), (9, 10, 10)],
)
def test_columns_that_are_padding_everywhere(length, total, columns):
    _, mask = pad_rows([[5], [5] * length, []], total)
    assert columns_in_use(mask) == columns
    assert columns_in_use(np.zeros_like(mask)) == min(16, total)
    assert columns_in_use(mask[:, ::-1]) == total
    assert columns_in_use(np.zeros_like(mask), mask) == columns
    data = {"x": mask, "y": None, "weight": np.ones(3)}
    assert {name: np.shape(x) for name, x in first_columns(data, columns).items()} == {
        "x": (3, columns),
        "y": (),
        "weight": (3,),
    }
