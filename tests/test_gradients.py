import numpy as np
from common import to_numpy
from keras import ops

from keras_vaultgemma import backend


def test_gradients_and_what_comes_with_them():
    x, y, unused = (ops.convert_to_tensor(np.array(values, "float32")) for values in ([1, 2], [3, 4], [5, 6]))

    def function(tensors):
        x, y, _ = tensors
        return ops.sum(x * x * y), {"product": x * y}

    found, others = backend.gradients(function, [x, y, unused])
    assert [to_numpy(g).tolist() for g in found] == [[6, 16], [1, 4], [0, 0]]
    assert to_numpy(others["product"]).tolist() == [3, 8]


def test_gradients_of_rows_of_a_table_are_dense():
    table, ids = ops.ones((4, 2)), ops.convert_to_tensor(np.array([1, 1, 3]))
    (found,), _ = backend.gradients(lambda tensors: (ops.sum(ops.take(tensors[0], ids, axis=0)), ()), [table])
    assert to_numpy(found).tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]


def test_add():
    assert to_numpy(backend.add(ops.ones(2), ops.arange(2, dtype="float32"))).tolist() == [1, 2]
