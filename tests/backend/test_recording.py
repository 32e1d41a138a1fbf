"""Operations on PyTorch, played back."""

import gc
import weakref

import numpy as np
import pytest

from keras_vaultgemma import backend
from keras_vaultgemma.backend.recording import Recording

if backend.NAME != "torch":
    pytest.skip("PyTorch alone records", allow_module_level=True)

import torch


def test_played_back_for_other_tensors():
    """Views, several results of an operation, a constant, a list of tensors, writing in place, the same tensor twice."""
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
        recording, result = Recording.of(function, first)
        expected = function(arguments(0))
        np.testing.assert_array_equal(result["joined"], expected["joined"])
        np.testing.assert_array_equal(first[1], expected["buffer"][0])
        for seed in range(1, 4):  # traced, and then optimised
            given = arguments(seed)
            buffer, same, joined = recording(given)
            expected = function(arguments(seed))
            np.testing.assert_array_equal(joined, expected["joined"])
            np.testing.assert_array_equal(buffer, expected["buffer"][0])
            assert buffer.data_ptr() == same.data_ptr() == given[1].data_ptr()


def test_keeps_no_tensor_but_constants():
    def function(tensors):
        return tensors[0] @ tensors[0] + 1.0

    with torch.no_grad():
        given = torch.ones(3, 3)
        recording, result = Recording.of(function, [given])
        kept = [weakref.ref(given), weakref.ref(result)]
        del given, result
        for _ in range(3):
            given = torch.ones(3, 3)
            (result,) = recording([given])
            kept += [weakref.ref(given), weakref.ref(result)]
            del given, result
    gc.collect()
    assert [reference() for reference in kept] == [None] * 8


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_products_with_a_matrix(rows):
    """By whichever library."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(24, 8, generator=generator)
    with torch.no_grad():
        recording, _ = Recording.of(
            lambda tensors: backend.matmul(*tensors), [torch.zeros(rows, 24), kernel]
        )
        for _ in range(3):
            x = torch.rand(rows, 24, generator=generator)
            np.testing.assert_allclose(
                recording([x, kernel])[0], x.numpy() @ kernel.numpy(), rtol=1e-5
            )
