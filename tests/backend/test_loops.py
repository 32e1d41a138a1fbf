"""Loops, and how many iterations run at once."""

import numpy as np
import pytest
from keras import ops

from keras_vaultgemma import backend


def test_equals_the_loop_of_keras():
    def body(i, total, log):
        twice = ops.cast(2 * i, "float32")
        return (
            i + 1,
            total + twice,
            ops.slice_update(log, ops.reshape(i, (1,)), ops.reshape(twice, (1,))),
        )

    state = (ops.zeros((), "int32"), ops.zeros(()), ops.zeros(5))
    i, total, log = backend.while_loop(lambda i, *_: i < 4, body, state)
    assert (int(i), float(total)) == (4, 12.0)
    np.testing.assert_array_equal(ops.convert_to_numpy(log), [0, 2, 4, 6, 0])


@pytest.mark.skipif(
    backend.NAME != "tensorflow", reason="other backends run one iteration at a time"
)
def test_tensorflow_runs_one_iteration_at_a_time():
    import tensorflow as tf

    @tf.function
    def run():
        return backend.while_loop(lambda i: i < 3, lambda i: (i + 1,), (tf.zeros((), tf.int32),))

    (loop,) = [
        op for op in run.get_concrete_function().graph.get_operations() if op.type.endswith("While")
    ]
    assert loop.get_attr("parallel_iterations") == 1
