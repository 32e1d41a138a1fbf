"""Loops, and how many iterations are under way at once."""

import time

import numpy as np
import pytest
from keras import ops

from keras_vaultgemma import backend


def test_it_is_the_loop_of_keras():
    def body(i, total, log):
        twice = ops.cast(2 * i, "float32")
        return i + 1, total + twice, ops.slice_update(log, ops.reshape(i, (1,)), ops.reshape(twice, (1,)))

    state = (ops.zeros((), "int32"), ops.zeros(()), ops.zeros(5))
    i, total, log = backend.while_loop(lambda i, *_: i < 4, body, state)
    assert (int(i), float(total)) == (4, 12.0)
    np.testing.assert_array_equal(ops.convert_to_numpy(log), [0, 2, 4, 6, 0])


@pytest.mark.skipif(backend.NAME != "tensorflow", reason="the others have no iterations side by side")
def test_one_iteration_is_under_way_at_a_time():
    import tensorflow as tf

    under_way, most = 0, 0

    def work(change):
        nonlocal under_way, most
        if change < 0:
            time.sleep(0.002)  # long enough for another thread to begin the next
        under_way += change
        most = max(most, under_way)
        return np.int32(0)

    def body(i, total):
        # What begins an iteration waits for `i` alone, which is known at once; what ends it waits for the total.
        begun = tf.numpy_function(work, [i * 0 + 1], tf.int32)
        with tf.control_dependencies([begun, total]):
            ended = tf.numpy_function(work, [i * 0 - 1], tf.int32)
        return i + 1, total + tf.ensure_shape(ended, ())

    @tf.function
    def run():
        return backend.while_loop(lambda i, _: i < 20, body, (tf.zeros((), tf.int32), tf.zeros((), tf.int32)))

    run()
    assert (under_way, most) == (0, 1)
