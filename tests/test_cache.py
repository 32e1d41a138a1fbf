import keras
import numpy as np
from common import to_numpy

from keras_vaultgemma import cache


def test_an_empty_cache_has_nothing_to_attend_to():
    empty = cache.empty(num_layers=2, batch=3, slots=4, num_key_value_heads=1, head_dim=2, dtype="float32")
    assert (to_numpy(empty.positions) == np.full((3, 4), cache.EMPTY)).all()
    assert [tuple(x.shape) for x in (*empty.keys, *empty.values)] == [(3, 1, 4, 2)] * 4


def test_write_puts_tokens_into_their_slots_and_casts():
    buffer = keras.ops.zeros((2, 5, 3), "float32")
    update = np.arange(12).reshape(2, 2, 3).astype("int32")
    written = to_numpy(cache.write(buffer, keras.ops.convert_to_tensor(update), 2))
    expected = np.zeros((2, 5, 3), "float32")
    expected[:, 2:4] = update
    np.testing.assert_array_equal(written, expected)
    again = cache.write(keras.ops.convert_to_tensor(written), keras.ops.convert_to_tensor(update[:, :1]), 4)
    expected[:, 4:] = update[:, :1]
    np.testing.assert_array_equal(to_numpy(again), expected)


def test_write_along_another_axis():
    buffer, update = keras.ops.zeros((2, 1, 4, 3), "float32"), np.ones((2, 1, 2, 3), "float32")
    written = to_numpy(cache.write(buffer, keras.ops.convert_to_tensor(update), 1, axis=2))
    np.testing.assert_array_equal(written[:, 0, :, 0], [[0, 1, 1, 0]] * 2)
