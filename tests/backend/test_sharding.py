import keras
from common import to_numpy

from keras_vaultgemma import backend


def test_without_a_distribution_one_share_has_all_rows():
    rows = keras.ops.arange(6, dtype="float32")
    of_rows, total = backend.per_device(lambda x, y: (x * y, keras.ops.sum(x)), rows, 2.0)
    assert to_numpy(of_rows).tolist() == [0, 2, 4, 6, 8, 10] and to_numpy(total) == 15


def test_a_model_runs_by_itself_unless_told_otherwise():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert backend.unsupported_executor(model) is None
    model.compile("sgd", "mse", jit_compile=True)
    assert backend.unsupported_executor(model) == (
        "torch.compile" if backend.NAME == "torch" else None
    )


def test_without_a_distribution_every_process_saves_its_own():
    with backend.all_gathered([keras.Variable([1.0])]) as writes:
        assert writes
