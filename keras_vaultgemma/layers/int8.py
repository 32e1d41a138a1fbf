"""TODO."""

from keras import ops

from keras_vaultgemma import backend


def int8_matmul(x, weight, scale, quantizer, transposed=False):
    """`x` [..., in] times the matrix that int8 `weight` [in, out], divided by `scale` [out], stands for; float32.

    `x` is rounded to int8, too, and its gradient is that of the product without this rounding, whose own would be 0.

    Args:
        quantizer: of `x`, with Keras's interface; None to leave `x` as it is.
        transposed: whether `weight` is [out, in] instead.
    """
    scale = ops.cast(scale, "float32")
    if quantizer is None:
        return ops.cast(backend.matmul(x, ops.cast(weight, x.dtype), transposed), "float32") / scale

    @ops.custom_gradient
    def product(x, weight, scale):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            # The scale goes to the side that has no more than a row for each token.
            upstream = ops.cast(upstream / scale, x.dtype)
            return backend.matmul(upstream, ops.cast(weight, x.dtype), not transposed), None, None

        rounded, x_scale = quantizer(x, axis=-1)
        products = ops.cast(backend.int8_matmul(rounded, weight, transposed), "float32")
        return products / (ops.cast(x_scale, "float32") * scale), gradient

    return product(x, ops.convert_to_tensor(weight), scale)
