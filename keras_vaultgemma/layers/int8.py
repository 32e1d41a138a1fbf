"""Int8 weights: their rounding, and matmuls with a gradient with respect to the activations."""

import keras
import numpy as np
from keras import ops

from keras_vaultgemma import backend

BLOCK = 2**18
"""Numbers of a matrix that are rounded at a time, so that they stay in the cache."""


class BlockQuantizer(keras.quantizers.AbsMaxQuantizer):
    """`keras.quantizers.AbsMaxQuantizer` of a matrix on the host, a block of rows at a time.

    The results are equal. Keras makes five temporary copies of the matrix, whose memory takes
    longer than the arithmetic: 1B parameters in float32 take 20 to 23 s instead of 8 to 10
    (2 Intel cores).

    Args:
        axis: int. The axis that shares a scale, of a matrix with two.
    """

    def __call__(self, x, axis=None, to_numpy=True):
        (axis,) = self.axis
        matrix = np.moveaxis(backend.numpy_view(x), axis, 1)
        rounded = np.empty(matrix.shape, "int8")
        scales = np.empty((len(matrix), 1), matrix.dtype)
        low, high = self.value_range
        step = max(1, BLOCK // matrix.shape[1])
        for start in range(0, len(matrix), step):
            rows = matrix[start : start + step]
            largest = np.max(np.abs(rows), 1, keepdims=True)
            with np.errstate(divide="ignore", over="ignore"):
                # As Keras computes it, so that the rounded numbers are the same.
                scale = np.divide(high, np.add(largest, self.epsilon))
            # In float16, epsilon is 0, and Keras would round 0 times infinity.
            scale[np.isinf(scale)] = 1
            block = np.multiply(rows, scale)
            np.clip(np.round(block, out=block), low, high, out=block)
            rounded[start : start + step], scales[start : start + step] = block, scale
        return np.moveaxis(rounded, 1, axis), np.moveaxis(scales, 1, axis)


def in_blocks(config, axis):
    """Return the config of an int8 quantization with a `BlockQuantizer` in place of Keras's own.

    Args:
        config: `keras.quantizers.Int8QuantizationConfig`, or None for Keras's default.
        axis: int. Axis of the matrix that shares a scale.
    """
    default = keras.quantizers.Int8QuantizationConfig() if config is None else config
    if default.weight_quantizer is not None:
        return config
    return keras.quantizers.Int8QuantizationConfig(
        BlockQuantizer(axis=axis), default.activation_quantizer
    )


def int8_matmul(x, weight, scale, quantizer, transposed=False):
    """Return the float32 matmul of activations with a quantized matrix.

    `x` is rounded to int8, too. Its gradient is that of the matmul without this rounding, because
    the gradient of rounding is 0.

    Args:
        x: float tensor [..., in].
        weight: int8 tensor [in, out]. Stands for `weight / scale`.
        scale: float tensor [out].
        quantizer: Keras quantizer of `x`, or None to leave `x` as it is.
        transposed: bool. True if `weight` is [out, in] instead. Defaults to False.
    """
    scale = ops.cast(scale, "float32")
    if quantizer is None:
        return ops.cast(backend.matmul(x, ops.cast(weight, x.dtype), transposed), "float32") / scale

    @ops.custom_gradient
    def product(x, weight, scale):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            # The scale divides the upstream gradient, because that has one row for each token and
            # the matrix has many.
            upstream = ops.cast(upstream / scale, x.dtype)
            return backend.matmul(upstream, ops.cast(weight, x.dtype), not transposed), None, None

        rounded, x_scale = quantizer(x, axis=-1)
        products = ops.cast(backend.int8_matmul(rounded, weight, transposed), "float32")
        return products / (ops.cast(x_scale, "float32") * scale), gradient

    return product(x, ops.convert_to_tensor(weight), scale)
