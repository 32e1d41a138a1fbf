import keras
import numpy as np
import pytest
from common import to_numpy
from keras import ops

from keras_vaultgemma import backend


def test_gradients_and_auxiliary_results():
    x, y, unused = (
        ops.convert_to_tensor(np.array(values, "float32")) for values in ([1, 2], [3, 4], [5, 6])
    )

    def function(tensors):
        x, y, _ = tensors
        return ops.sum(x * x * y), {"product": x * y}

    found, others = backend.gradients(function, [x, y, unused])
    assert [to_numpy(g).tolist() for g in found] == [[6, 16], [1, 4], [0, 0]]
    assert to_numpy(others["product"]).tolist() == [3, 8]


def test_gradients_of_rows_of_a_table_are_dense():
    table, ids = ops.ones((4, 2)), ops.convert_to_tensor(np.array([1, 1, 3]))
    (found,), _ = backend.gradients(
        lambda tensors: (ops.sum(ops.take(tensors[0], ids, axis=0)), ()), [table]
    )
    assert to_numpy(found).tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]


TABLE = np.arange(12, dtype="float32").reshape(6, 2) / 10
IDS = np.array([[1, 1, 3], [5, 1, 0]], "int32")
COUNTS = np.bincount(IDS.ravel(), minlength=6)[:, None]
USES = {
    "none": (lambda table: 0.0, 0),
    "squares": (lambda table: ops.sum(ops.square(table)), 2 * TABLE),
    "sum": (lambda table: ops.sum(table), 1),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["eagerly", "compiled", "XLA", "within a loop"])
def test_gradients_of_rows_add_to_those_of_other_uses_of_a_table(use, how):
    others, of_others = USES[use]
    variable = keras.Variable(TABLE)

    def function(tensors):
        rows = backend.take_rows(tensors[0], ops.convert_to_tensor(IDS))
        return ops.sum(ops.square(rows)) + others(tensors[0]), ()

    def run():
        def more(count, total):
            (found,), _ = backend.gradients(function, [backend.value_of(variable)])
            return count + 1, total + found

        state = (ops.zeros((), "int32"), backend.zeros(TABLE.shape))
        if how == "within a loop":
            return backend.while_loop(lambda count, _: count < 2, more, state)[1]
        return more(*state)[1]

    call = (
        run
        if how == "eagerly"
        else backend.compile_function(run, [variable], jit_compile=how == "XLA")
    )
    expected = (2 * TABLE * COUNTS + of_others) * (2 if how == "within a loop" else 1)
    for _ in range(3):
        np.testing.assert_allclose(to_numpy(call()), expected, rtol=1e-6)
    np.testing.assert_array_equal(to_numpy(variable), TABLE)


def test_multiply_no_nan_is_0_where_a_factor_is_0():
    x = ops.convert_to_tensor(np.array([[1, 2], [np.nan, np.inf], [3, -np.inf]], "float32"))
    factors = ops.convert_to_tensor(np.array([[0.5], [0], [2]], "float32"))
    assert to_numpy(backend.multiply_no_nan(x, factors)).tolist() == [
        [0.5, 1],
        [0, 0],
        [6, -np.inf],
    ]


def test_add_in_place():
    assert to_numpy(backend.add_in_place(ops.ones(2), ops.arange(2, dtype="float32"))).tolist() == [
        1,
        2,
    ]
