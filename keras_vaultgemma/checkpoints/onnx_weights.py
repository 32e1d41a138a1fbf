"""The weights of an ONNX file, by their names in it, read from a checkpoint block by block."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.checkpoints.onnx_graph import TABLE, scale_name
from keras_vaultgemma.layers.int8 import BlockQuantizer

INT8 = "int8"


class OnnxWeight(NamedTuple):
    """A weight as a file stores it.

    Attributes:
        shape: tuple of ints. Matrices are [in, out], and the table is [V, D].
        dtype: NumPy dtype.
        blocks: function without arguments. Returns an iterator of contiguous arrays of rows.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self):
        """Size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def of_array(array):
    """Return the `OnnxWeight` of a NumPy array."""
    return OnnxWeight(array.shape, array.dtype, lambda: iter([np.ascontiguousarray(array)]))


def norm_weight(scale):
    """Return the `OnnxWeight` of the scale of a norm, with the 1 added."""
    return of_array(np.float32(1) + np.asarray(scale).astype("float32"))


def checkpoint_weights(hyperparameters, values, dtype):
    """Return a dict of names to `OnnxWeight` for the weights of a checkpoint.

    Args:
        hyperparameters: dict. Constructor arguments of the backbone.
        values: dict of the variables' paths to `LazyTensor`.
        dtype: string. Dtype of the matrices: float32, float16, bfloat16, or int8, to which
            `quantize("int8")` rounds them. One matrix at a time is then in memory.
    """
    weights: dict[str, Any] = {}
    for weight in weight_map.weight_map(hyperparameters):
        value, location = values[weight.path], weight.locations[weight_map.KERAS]
        if len(weight.shape) == 1:
            weights[weight.path] = norm_weight(value.read("float32"))
        elif dtype == INT8:
            quantized = _Quantized(value, is_transposed=weight.path != TABLE)
            weights[weight.path] = OnnxWeight(location.shape, np.dtype("i1"), quantized.values)
            weights[scale_name(weight.path)] = OnnxWeight(
                weight.shape[:1], np.dtype("<f4"), quantized.scales
            )
        else:
            weights[weight.path] = OnnxWeight(
                location.shape, DTYPES[dtype], _Blocks(value, location, DTYPES[dtype])
            )
    return weights


class _Blocks(NamedTuple):
    """The blocks of a weight in floating point, as a function."""

    value: Any
    location: Any
    dtype: Any

    def __call__(self):
        return self.value.blocks(self.location, self.dtype)


class _Quantized:
    """A matrix of a checkpoint, rounded to int8 where it is read, a row of the variable at a time.

    Args:
        value: `LazyTensor`.
        is_transposed: bool. True if the file has the transposed variable.
    """

    def __init__(self, value, is_transposed):
        self._value, self._is_transposed = value, is_transposed
        self._scale = None

    def values(self):
        """Yield the matrix in int8."""
        rounded = self._quantize()
        yield np.ascontiguousarray(rounded.T if self._is_transposed else rounded)

    def scales(self):
        """Yield the numbers that the rows were multiplied by."""
        if self._scale is None:
            self._quantize()
        yield self._scale

    def _quantize(self):
        rounded, scale = BlockQuantizer(axis=1)(self._value.read("float32"))
        self._scale = scale.reshape(-1)
        return rounded
