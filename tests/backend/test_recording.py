"""Recording of PyTorch operations, and their replay."""

import gc
import weakref

import keras
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import backend
from keras_vaultgemma.backend import recording

only_torch = pytest.mark.skipif(backend.NAME != "torch", reason="other backends compile loops")


def test_a_step_is_the_same_when_it_is_replayed(monkeypatch):
    """With state from step to step, a buffer written in place, and variables that change."""
    monkeypatch.setattr(recording, "EAGER_CALLS", 2)
    variable = keras.Variable(np.array([2.0, 3.0], "float32"))

    def step(state, numbers):
        buffer, slot = state["buffer"], state["slot"]
        value = keras.ops.take(numbers, slot, axis=0) * variable
        return {"buffer": backend.write_slice(buffer, value[None, None], slot), "slot": slot + 1}

    begin = backend.record_step(step, [variable])
    numbers = np.arange(1, 7, dtype="float32")
    expected = np.zeros((1, 6, 2), "float32")
    slot = keras.ops.convert_to_tensor(np.int32(0))
    state = {"buffer": keras.ops.zeros((1, 6, 2)), "slot": slot}
    for i in range(6):
        variable.assign([2.0, i])
        state = begin()(state, keras.ops.convert_to_tensor(numbers))
        expected[0, i] = numbers[i] * np.array([2, i])
        np.testing.assert_array_equal(to_numpy(state["buffer"]), expected)
        assert int(state["slot"]) == i + 1


@only_torch
def test_a_step_is_recorded_once_for_each_shape():
    calls = []
    step = backend.record_step(lambda x: calls.append(1) or x + 1, [])()
    for length in (2, 3):
        for _ in range(2 * recording.EAGER_CALLS):
            step(keras.ops.zeros((length,)))
    assert len(calls) == 2 * (recording.EAGER_CALLS + 1)


@only_torch
def test_recording_copies_no_argument():
    """Otherwise a cache would be in memory twice."""
    step = backend.record_step(lambda x: x.add_(1), [])()
    x = start = keras.ops.zeros((3,))
    for i in range(2 * recording.EAGER_CALLS):
        x = step(x)
        assert x.data_ptr() == start.data_ptr()
        assert to_numpy(x).tolist() == [i + 1] * 3


@only_torch
def test_replay_for_other_tensors():
    """Views, an operation with several results, a constant, lists, writes in place, an alias."""
    import torch

    constant = torch.tensor([1.0, 2.0])

    def function(tensors):
        x, buffer = tensors
        first, second = x.t().split(1, dim=0)
        joined = torch.cat([first, second * constant.sum(), first], dim=0)
        buffer[1:3] += joined[:2].sum(0)
        return {"joined": joined, "buffer": [buffer, buffer]}

    def arguments(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(2, 2, generator=generator), torch.rand(4, 2, generator=generator)]

    with torch.no_grad():
        first = arguments(0)
        recorded, result = recording.Recording.of(function, first)
        expected = function(arguments(0))
        np.testing.assert_array_equal(result["joined"], expected["joined"])
        np.testing.assert_array_equal(first[1], expected["buffer"][0])
        for seed in range(1, 4):  # traced, and then optimised
            given = arguments(seed)
            buffer, same, joined = recorded(given)
            expected = function(arguments(seed))
            np.testing.assert_array_equal(joined, expected["joined"])
            np.testing.assert_array_equal(buffer, expected["buffer"][0])
            assert buffer.data_ptr() == same.data_ptr() == given[1].data_ptr()


@only_torch
def test_no_tensor_stays_alive_but_constants():
    import torch

    def function(tensors):
        return tensors[0] @ tensors[0] + 1.0

    with torch.no_grad():
        given = torch.ones(3, 3)
        recorded, result = recording.Recording.of(function, [given])
        references = [weakref.ref(given), weakref.ref(result)]
        del given, result
        for _ in range(3):
            given = torch.ones(3, 3)
            (result,) = recorded([given])
            references += [weakref.ref(given), weakref.ref(result)]
            del given, result
    gc.collect()
    assert [reference() for reference in references] == [None] * 8


@only_torch
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_matmuls_of_either_library(rows):
    import torch

    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(24, 8, generator=generator)
    with torch.no_grad():
        recorded, _ = recording.Recording.of(
            lambda tensors: backend.matmul(*tensors), [torch.zeros(rows, 24), kernel]
        )
        for _ in range(3):
            x = torch.rand(rows, 24, generator=generator)
            expected = x.numpy() @ kernel.numpy()
            np.testing.assert_allclose(recorded([x, kernel])[0], expected, rtol=1e-5)


@only_torch
def test_a_matmul_of_onednn_is_replayed(monkeypatch):
    """Which the tracer does not know. It is called for large matrices."""
    monkeypatch.setattr(recording, "EAGER_CALLS", 1)
    values = np.random.default_rng(0).normal(size=(512, 512)).astype("float32")
    kernel = keras.Variable(values)
    begin = backend.record_step(lambda x: backend.matmul(x, kernel.value), [kernel])
    x = keras.ops.convert_to_tensor(values[:8])
    for _ in range(4):
        found = begin()(x)
    np.testing.assert_allclose(to_numpy(found), values[:8] @ values, rtol=1e-3, atol=1e-3)
