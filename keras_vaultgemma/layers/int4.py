"""Int4 weights in groups that share a scale and a zero point: how they are read and multiplied.

Keras packs two neighbouring columns of a matrix into one int8 number. A matmul of few rows takes
its two halves, the even and the odd columns, separately, because to interleave them would take
another copy of the matrix. With many rows, a copy of the matrix costs less than halves of the
activations. A matmul dequantizes the matrix again for the gradient, so that no matrix in floating
point is kept from the forward to the backward pass.
"""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend

ROWS = 2**13
"""Rows of a table that are quantized at a time."""

MANY_ROWS = 512
"""Rows of activations from which they are multiplied with a whole matrix, instead of two halves.

In float32 alone: a LoRA step in bfloat16 takes 1.25 times as long with whole matrices on TensorFlow
(width 1152, 1024 tokens, 2 Intel cores), and the same time on other backends.
"""


def quantize_rows(table, block):
    """Return `(packed, scale, zero)` of a table whose rows are divided into groups, as Keras does.

    Args:
        table: NumPy array `[V, D]`.
        block: int. Size of a group.
    """
    parts = []
    for start in range(0, len(table), ROWS):
        rows = table[start : start + ROWS].astype("float32").T
        q, *groups = keras.quantizers.abs_max_quantize_grouped_with_zero_point(
            rows, block_size=block, to_numpy=True
        )
        q, _, _ = keras.quantizers.pack_int4(ops.transpose(ops.convert_to_tensor(q)), axis=-1)
        columns = [ops.convert_to_numpy(x).T for x in groups]
        parts.append((ops.convert_to_numpy(q), *columns))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


class Int4Matrix(NamedTuple):
    """A matrix `[R, C]` that Keras has quantized to int4.

    Attributes:
        packed: int8 tensor `[R, C / 2]`. The low four bits are those of an even column, the high
            ones those of the next.
        scale: float tensor `[groups, C]`, or `[R, groups]`. Of one axis, without groups: the
            numbers that a column (or a row) was multiplied by.
        zero: int8 tensor of the shape of `scale`, or None without groups.
        block: int. Size of a group.
        axis: int. Axis of the matrix that is divided into groups, 0 or 1.
        columns: int C.
    """

    packed: Any
    scale: Any
    zero: Any
    block: int
    axis: int
    columns: int

    @classmethod
    def of(cls, variables, block, axis, columns):
        """Return the matrix of a layer's variables `(packed, scale, zero)`."""
        values = (None if x is None else backend.value_of(x) for x in variables)
        return cls(*values, block, axis, columns)

    def halves(self, dtype, packed=None, scale=None, zero=None):
        """Return the even and the odd columns in floating point.

        Args:
            dtype: string.
            packed, scale, zero: tensors of some rows of the matrix, if `axis` is 1. Default to all.
        """
        packed = self.packed if packed is None else packed
        scale, zero = (self.scale, self.zero) if scale is None else (scale, zero)
        high = ops.right_shift(packed, ops.cast(4, "int8"))
        low = ops.right_shift(ops.left_shift(packed, ops.cast(4, "int8")), ops.cast(4, "int8"))
        return [self._dequantize(q, i, scale, zero, dtype) for i, q in enumerate((low, high))]

    def _dequantize(self, q, parity, scale, zero, dtype):
        if zero is None:  # one scale a column (axis 0) or a row
            scale = scale[..., None] if self.axis else _half(scale, parity, q.shape[-1])
            return ops.cast(q, dtype) / ops.cast(scale, dtype)
        size = q.shape[-1] if self.axis else q.shape[0]
        step, first = (2, parity) if self.axis else (1, 0)
        groups = np.minimum((np.arange(size) * step + first), self._length - 1) // self.block
        if not self.axis:
            scale, zero = (_half(x, parity, q.shape[-1]) for x in (scale, zero))
        axis = len(q.shape) - 1 if self.axis else 0
        count = scale.shape[axis]
        if size % count or not np.array_equal(groups, np.repeat(np.arange(count), size // count)):
            scale, zero = (ops.take(x, groups, axis=axis) for x in (scale, zero))
            return ops.cast(q - zero, dtype) * ops.cast(scale, dtype)
        shape = [*ops.shape(q)[:axis], count, size // count, *ops.shape(q)[axis + 1 :]]
        q, zero = ops.reshape(q, shape), ops.expand_dims(zero, axis + 1)
        product = ops.cast(q - zero, dtype) * ops.cast(ops.expand_dims(scale, axis + 1), dtype)
        return ops.reshape(product, [*shape[:axis], size, *shape[axis + 2 :]])

    @property
    def _length(self):
        return self.columns if self.axis else self.packed.shape[0]

    def dense(self, dtype):
        """Return the whole matrix in floating point."""
        return _interleave(*self.halves(dtype))[..., : self.columns]

    def rows(self, ids, dtype):
        """Return the rows of some ids in floating point, `[..., C]`, if `axis` is 1."""
        chosen = [None if x is None else backend.take_rows(x, ids) for x in self[:3]]
        return _interleave(*self.halves(dtype, *chosen))[..., : self.columns]

    def matmul(self, x, transposed=False):
        """Return `x @ matrix`, or `x @ matrix^T` if `transposed`. Only `x` has a gradient."""
        tensors = [value for value in self[:3] if value is not None]

        @ops.custom_gradient
        def product(x, *tensors):
            def gradient(*args, upstream=None):
                upstream = args[0] if upstream is None else upstream
                return self._multiply(upstream, tensors, not transposed), *[None] * len(tensors)

            return self._multiply(x, tensors, transposed), gradient

        return product(x, *tensors)

    def _multiply(self, x, tensors, transposed):
        matrix = self._replace(**dict(zip(self._fields, tensors, strict=False)))
        is_float32 = keras.backend.standardize_dtype(x.dtype) == "float32"
        if is_float32 and _row_count(x) >= MANY_ROWS:
            return backend.matmul(x, matrix.dense(x.dtype), transposed)
        halves = matrix.halves(x.dtype)
        if not transposed:
            return _interleave(*(backend.matmul(x, half) for half in halves))[..., : self.columns]
        columns = 2 * halves[0].shape[1]
        if columns > self.columns:  # an odd number
            x = ops.pad(x, [*[(0, 0)] * (len(x.shape) - 1), (0, columns - self.columns)])
        return sum(
            backend.matmul(x[..., parity::2], half, transposed=True)
            for parity, half in enumerate(halves)
        )


def _row_count(x):
    """Return the number of rows of `x`, infinity if it is not known yet."""
    sizes = x.shape[:-1]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else math.inf


def _half(x, parity, size):
    """Return every second column. An odd number of columns is filled up."""
    half = x[..., parity::2]
    if half.shape[-1] == size:
        return half
    return ops.concatenate([half, half[..., -1:]], -1)


def _interleave(even, odd):
    return ops.reshape(ops.stack([even, odd], -1), [*ops.shape(even)[:-1], 2 * even.shape[-1]])
