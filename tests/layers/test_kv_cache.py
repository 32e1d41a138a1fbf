import keras
import numpy as np
from common import to_numpy

from keras_vaultgemma.layers import kv_cache


def test_an_empty_cache_has_nothing_to_attend_to():
    empty = kv_cache.empty_cache(
        num_layers=2, batch=3, slots=4, num_key_value_heads=1, head_dim=2, dtype="float32"
    )
    assert (to_numpy(empty.positions) == np.full((3, 4), kv_cache.EMPTY)).all()
    assert [tuple(x.shape) for x in (*empty.keys, *empty.values)] == [(3, 4, 2)] * 4


def test_write_puts_tokens_into_their_slots_and_casts():
    buffer = keras.ops.zeros((2, 5, 3), "float32")
    update = np.arange(12).reshape(2, 2, 3).astype("int32")
    written = to_numpy(kv_cache.write(buffer, keras.ops.convert_to_tensor(update), 2))
    expected = np.zeros((2, 5, 3), "float32")
    expected[:, 2:4] = update
    np.testing.assert_array_equal(written, expected)
    again = kv_cache.write(
        keras.ops.convert_to_tensor(written), keras.ops.convert_to_tensor(update[:, :1]), 4
    )
    expected[:, 4:] = update[:, :1]
    np.testing.assert_array_equal(to_numpy(again), expected)


def test_a_cache_by_row_and_back():
    x = np.arange(48, dtype="float32").reshape(6, 4, 2)
    positions = keras.ops.zeros((3, 4), "int32")
    by_row = kv_cache.split_heads(
        kv_cache.KVCache(
            (keras.ops.convert_to_tensor(x),), (keras.ops.convert_to_tensor(-x),), positions
        )
    )
    np.testing.assert_array_equal(to_numpy(by_row.keys[0]), x.reshape(3, 2, 4, 2))
    again = kv_cache.merge_heads(by_row)
    np.testing.assert_array_equal(to_numpy(again.keys[0]), x)
    np.testing.assert_array_equal(to_numpy(again.values[0]), -x)
