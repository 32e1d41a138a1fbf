"""Gradients of a function of tensors, outside what Keras's own train steps differentiate."""

import keras

from keras_vaultgemma.backend.choice import NAME


def gradients(function, tensors):
    """The gradients of a scalar with respect to tensors.

    Args:
        function: takes a list like `tensors`, returns a pair of a float scalar and nested tensors.
        tensors: list of float tensors.

    Returns:
        `(gradients, nested tensors)`: a list of tensors like `tensors`, 0 where the scalar does not depend on one.
    """
    if NAME == "jax":
        import jax

        return jax.grad(function, has_aux=True)(tensors)

    if NAME == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensors)
            scalar, others = function(tensors)
        found = tape.gradient(scalar, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # That of an embedding is a list of rows.
        return [tf.convert_to_tensor(gradient) for gradient in found], others

    import torch

    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        scalar, others = function(tensors)
        found = torch.autograd.grad(scalar, tensors, allow_unused=True)
    found = [torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, tensors, strict=True)]
    return found, keras.tree.map_structure(lambda x: x.detach(), others)


def add(buffer, update):
    """`buffer + update` in the memory of `buffer`, which is consumed: PyTorch adds in place, XLA reuses it in loops."""
    return buffer.add_(update) if NAME == "torch" else buffer + update


def without_gradients(function):
    """`function` as it runs on PyTorch without keeping anything for a backward pass; elsewhere unchanged."""
    if NAME != "torch":
        return function
    import torch

    return torch.no_grad()(function)
