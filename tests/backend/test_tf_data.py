import keras
import numpy as np
import pytest

from keras_vaultgemma import backend


def test_what_other_libraries_make_is_not_tensorflow():
    assert not any(map(backend.is_tensorflow, ("text", [1], np.ones(2), keras.KerasTensor((2,)))))
    assert not backend.is_symbolic_tensorflow(np.ones(2))


@pytest.mark.skipif(backend.NAME != "tensorflow", reason="TensorFlow is imported there alone")
def test_batches_and_functions_inside_tensorflow():
    import tensorflow as tf

    batches = [np.arange(3, dtype="int32"), np.arange(3, 6, dtype="int32")]
    dataset = backend.tensorflow_dataset(lambda: iter(batches), keras.KerasTensor((3,), "int32"))
    assert backend.is_tensorflow(dataset)
    seen, called = [], []

    def double(x):
        seen.append((backend.is_tensorflow(x), backend.is_symbolic_tensorflow(x)))
        (x,) = backend.call_in_graph(lambda x: called.append(x.tolist()), [x], [x])
        return 2 * x

    found = [batch.tolist() for batch in dataset.map(double).as_numpy_iterator()]
    assert found == [[0, 2, 4], [6, 8, 10]] and seen == [(True, True)]
    assert called == [batch.tolist() for batch in batches]
    assert backend.is_tensorflow(tf.constant(1)) and not backend.is_symbolic_tensorflow(
        tf.constant(1)
    )


@pytest.mark.skipif(backend.NAME == "tensorflow", reason="there it works")
def test_datasets_need_tensorflow():
    with pytest.raises(ValueError, match=f"Received: the backend '{backend.NAME}'"):
        backend.tensorflow_dataset(lambda: iter(()), keras.KerasTensor((3,), "int32"))
