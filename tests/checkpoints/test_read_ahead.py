"""Reading before it is asked for gives what reading when it is asked for gives."""

import gc
import threading

import numpy as np
import pytest

from keras_vaultgemma.checkpoints import read_ahead
from keras_vaultgemma.checkpoints.read_ahead import read_ahead


class Stored:
    """Stands for a `StoredTensor`, and remembers how it was read."""

    def __init__(self, number, log, nbytes=8):
        self.shape, self.nbytes = (number,), nbytes
        self.number, self.log, self.was_read = number, log, threading.Event()

    def read(self, dtype):
        self.log.append((self.number, dtype, threading.current_thread()))
        self.was_read.set()
        if self.number < 0:
            raise ValueError("no file")
        return np.full(2, self.number, dtype)


def values_of(numbers, log, nbytes=8):
    return {str(number): Stored(number, log, nbytes) for number in numbers}


@pytest.mark.parametrize("order", ["01234", "43210", "20143"])
def test_whatever_the_order_each_is_read_once(order):
    log = []
    with read_ahead(values_of(range(5), log)) as values:
        assert [value.shape for value in values.values()] == [(0,), (1,), (2,), (3,), (4,)]
        for path in order:
            assert values[path].read("float32").tolist() == [float(path)] * 2
    assert sorted(number for number, *_ in log) == list(range(5))


def test_the_next_is_read_before_it_is_asked_for():
    stored = values_of(range(3), [])
    with read_ahead(stored) as values:
        values["0"].read("float32")
        assert stored["1"].was_read.wait(10) and stored["2"].was_read.wait(10)


def test_no_more_is_read_ahead_than_the_limit(monkeypatch):
    monkeypatch.setattr(read_ahead, "LIMIT", 16)
    stored = values_of(range(6), [])
    with read_ahead(stored) as values:
        values["0"].read("float32")
        assert stored["2"].was_read.wait(10)
        values["1"].read("float32")
        assert stored["3"].was_read.wait(10)
    assert not stored["4"].was_read.is_set()


def test_one_of_another_dtype_is_read_anew():
    log = []
    with read_ahead(values_of(range(3), log)) as values:
        read = [
            values["0"].read("float32"),
            values["1"].read("float16"),
            values["2"].read("float16"),
        ]
    assert [value.dtype for value in read] == ["float32", "float16", "float16"]
    assert [value[0] for value in read] == [0, 1, 2]


def test_errors_arrive_and_end_the_thread():
    log = []
    with (
        pytest.raises(ValueError, match="no file"),
        read_ahead(values_of((1, -1, 2), log)) as values,
    ):
        values["1"].read("float32")
        values["-1"].read("float32")
    assert not any(thread.is_alive() for *_, thread in log)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_before(enabled):
    was_enabled = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(KeyError), read_ahead(None) as values:
            assert values is None and not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was_enabled else gc.disable()
