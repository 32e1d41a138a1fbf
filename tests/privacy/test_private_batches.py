import keras
import numpy as np
import pytest

from keras_vaultgemma.privacy.accounting import Steps
from keras_vaultgemma.privacy.sampling import PrivateBatches, as_rows, sample_rows
from keras_vaultgemma.privacy.seeds import layer_seed, noise_seed
from keras_vaultgemma.training.batches import Batches

SECRET = bytes(range(16))


def batches(first_step=0, max_batch_size=12, microbatch=5):
    x = {
        "token_ids": np.arange(1, 41)[:, None].repeat(3, 1),
        "padding_mask": np.ones((40, 3), "int32"),
    }
    rows = (x, np.arange(1, 41), np.full(40, 0.5, "float32"))
    steps = Steps(0, 40, 0.2, max_batch_size, 1.5)
    return PrivateBatches(rows, steps, 50, 2, microbatch, SECRET, first_step, "aaaaaaaa:01", 3)


def test_a_batch_has_the_rows_of_its_step_and_zeros():
    data = batches(first_step=7)
    assert len(data) == 50
    for i in range(50):
        x, y, step = data[i]
        drawn = sample_rows(SECRET, 7 + i, 40, 0.2, 12)
        assert step["count"].tolist() == [len(drawn)]
        assert y.tolist() == [*(drawn + 1), *[0] * (15 - len(drawn))]
        assert (x["token_ids"] == y[:, None]).all() and (
            x["padding_mask"] == (y > 0)[:, None]
        ).all()
        assert (step["sample_weight"] == 0.5 * (y > 0)).all()
        seeds = [noise_seed(SECRET, 7 + i, variable) for variable in (0, 1)]
        np.testing.assert_array_equal(step["noise_seeds"].view("uint32"), seeds)
        seeds = [layer_seed(SECRET, 7 + i, layer) for layer in range(4)]
        np.testing.assert_array_equal(step["layer_seeds"], seeds)
        assert step["noise_multiplier"] == [np.float32(1.5)] and step["expected_rows"] == [8]


def test_how_many_there_are_is_no_fact_of_a_run():
    assert (
        Batches(batches(), 1, False, 0).facts.items()
        >= {"rows": 40, "fingerprint": "aaaaaaaa:01"}.items()
    )
    assert "items" not in Batches(batches(), 1, False, 0).facts


def test_no_seed_comes_twice():
    data = batches()
    assert len({seed.tobytes() for i in range(50) for seed in data[i][2]["noise_seeds"]}) == 100
    assert len({seed.tobytes() for i in range(50) for seed in data[i][2]["layer_seeds"]}) == 200


def test_the_same_index_is_the_same_batch():
    first, second = batches()[3], batches()[3]
    keras.tree.map_structure(np.testing.assert_array_equal, first, second)


def test_room_for_all_rows_is_enough():
    assert batches(max_batch_size=1000)[0][1].shape == (40,)


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"a": np.array([index, -index])}, np.array([1, 2])


def test_a_dataset_is_read_batch_by_batch():
    x, y = as_rows(Pairs())
    assert x["a"].tolist() == [0, 0, 1, -1, 2, -2] and y.tolist() == [1, 2] * 3


@pytest.mark.parametrize("data", [iter([1]), (i for i in [1]), "text"])
def test_rows_that_cannot_be_drawn_are_refused(data):
    with pytest.raises(
        ValueError,
        match="draws its rows one by one: data must be strings, arrays or a `keras.utils.PyData",
    ):
        as_rows(data)
