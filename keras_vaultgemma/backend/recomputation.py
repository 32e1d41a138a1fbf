"""What the backward pass computes again instead of keeping it."""

import keras

from keras_vaultgemma.backend.choice import NAME
from keras_vaultgemma.backend.tensors import after


def recomputed(function):
    """`function` of tensors, of which nothing but the arguments is kept for its gradient; that computes it again.

    What gets a gradient must be an argument. On JAX this is not `jax.checkpoint` (Keras's `remat`): there nothing keeps
    the second computation from being done long before its gradient is asked for, and XLA's CPU scheduler, which looks
    for work that can be done at once, does so: all layers' intermediate values are then in memory together. Here the
    first argument, a float, is not to be had the second time before the gradient of the result is.
    """
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
