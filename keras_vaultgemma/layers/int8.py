"""Matmuls with int8 weights and a gradient with respect to the activations."""

from keras import ops

from keras_vaultgemma import backend


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
