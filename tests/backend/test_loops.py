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


@pytest.mark.parametrize("static_lengths", [False, True])
@pytest.mark.parametrize(
    "count, equal, powers, singles",
    [
        (0, [], [], []),
        (2, [2], [2], [1, 1]),
        (8, [4, 4], [4, 4], [4, 4]),
        (10, [4, 3, 3], [4, 4, 2], [4, 4, 1, 1]),
        (11, [4, 4, 3], [4, 4, 2, 1], [4, 4, 1, 1, 1]),
    ],
)
def test_blocks_have_all_elements_once(count, equal, powers, singles, static_lengths):
    """They are equally long, or whole blocks come first and then powers of two or single elements."""
    expected = equal if backend.NAME == "torch" else powers
    if backend.NAME == "jax" or (static_lengths and backend.NAME == "tensorflow"):
        expected = singles
    elements = ops.arange(12, dtype="int32")

    def function(count):
        def body(start, length, state):
            blocks, log, total = state
            assert isinstance(length, int) or not static_lengths
            found = ops.slice(elements, (start,), (length,))
            this = ops.reshape(ops.cast(length, "int32"), (1,))
            log = ops.slice_update(log, (blocks,), this)
            return blocks + 1, log, total + ops.sum(found)

        zero = ops.zeros((), "int32")
        state = zero, ops.zeros(12, "int32"), zero
        return backend.loop_in_blocks(body, count, 4, state, static_lengths)

    run = backend.compile_function(function, [], jit_compile=False)
    blocks, log, total = run(ops.convert_to_tensor(np.int32(count)))
    assert ops.convert_to_numpy(log)[: int(blocks)].tolist() == expected
    assert int(total) == sum(range(count))
