"""What the backward pass computes again instead of keeping it, and operations that are compiled into one."""

import functools

import keras

from keras_vaultgemma.backend.choice import NAME
from keras_vaultgemma.backend.tensors import after


def fused(function):
    """`function` of tensors and Python values, without a gradient, as one program.

    Keras compiles everything on JAX and nothing on PyTorch. In TensorFlow's graphs, which `fit` runs operation by
    operation, XLA compiles this alone: elementwise operations read and write their tensors once.
    """
    return _fused_in_graphs(function) if NAME == "tensorflow" else function


@functools.cache  # a program for all layers
def _fused_in_graphs(function):
    import tensorflow as tf

    compiled = tf.function(function, jit_compile=True, autograph=False)
    return lambda *args: (function if tf.executing_eagerly() else compiled)(*args)


def recomputed(function, elementwise=False):
    """`function` of tensors, of which nothing but the arguments is kept for its gradient; that computes it again.

    What gets a gradient must be an argument. On JAX this is not `jax.checkpoint` (Keras's `remat`): there nothing keeps
    the second computation from being done long before its gradient is asked for, and XLA's CPU scheduler, which looks
    for work that can be done at once, does so: all layers' intermediate values are then in memory together. Here the
    first argument, a float, is not to be had the second time before the gradient of the result is.

    Args:
        elementwise: whether it is elementwise in all its arguments, so that it and its gradient can be `fused`.
    """
    if NAME == "tensorflow" and elementwise:
        return _recomputed_in_graphs(function)
    if NAME != "jax":
        return keras.remat(function)
    import jax

    @jax.custom_vjp
    def call(*args):
        return function(*args)

    def first_pass(*args):
        return function(*args), args

    def backward(args, upstream):
        first = after(args[0], jax.tree.leaves(upstream)[0])
        _, gradient = jax.vjp(function, first, *args[1:])
        return gradient(upstream)

    call.defvjp(first_pass, backward)
    return call


@functools.cache
def _recomputed_in_graphs(function):
    import tensorflow as tf

    def gradients(args, upstream):
        with tf.GradientTape() as tape:
            tape.watch(args)
            result = function(*args)
        return tape.gradient(result, args, upstream)

    @tf.custom_gradient
    def call(*args):
        return fused(function)(*args), lambda upstream: fused(gradients)(args, upstream)

    return call
