"""Calls of inner layers that skip `keras.layers.Layer.__call__`."""

import keras


def call_layer(layer, x, **kwargs):
    """Return `layer(x, **kwargs)`, without the overhead of `Layer.__call__` if it is built.

    `Layer.__call__` spends about 0.3 ms of Python on argument checks, name scopes and masks, 286
    times for each token that VaultGemma 1B decodes, which is a third of the time of a token where
    Python runs every operation (PyTorch). Outermost layers keep `__call__`, because it builds
    layers, records symbolic calls and sets `training`; inner layers get `training` as an argument.

    A layer that needs a cast of its input or of its variables (mixed precision) is still called by
    `__call__`, because only Keras can set the scope that casts variables.

    Args:
        layer: `keras.layers.Layer`.
        x: tensor. The first argument of the layer's `call`.
        **kwargs: further arguments of the layer's `call`.

    Returns:
        What the layer's `call`, or `quantized_call` of a quantized layer, returns.
    """
    if not layer.built or _casts(layer, x.dtype):
        return layer(x, **kwargs)
    call = layer.call if layer.quantization_mode is None else layer.quantized_call
    return call(x, **kwargs)


def _casts(layer, dtype):
    dtype, compute_dtype = keras.backend.standardize_dtype(dtype), layer.compute_dtype
    is_cast = dtype != compute_dtype and "float" in dtype and layer.autocast
    return is_cast or layer.variable_dtype != compute_dtype
