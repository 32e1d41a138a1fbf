"""What the backward pass computes again instead of keeping it."""

import keras

from keras_vaultgemma.backend.choice import NAME
from keras_vaultgemma.backend.tensors import after


def recomputed(function):
    """`function` of tensors, of which nothing but the arguments is kept for its gradient; that computes it again.

    What gets a gradient must be an argument, the first a float. On JAX and in a compiled function of TensorFlow this is
    not Keras's `remat`. There nothing keeps the second computation from being done long before its gradient is asked
    for: XLA's CPU scheduler does what can be done at once, and TensorFlow folds away the condition that was to prevent
    it. All layers' intermediate values are then in memory together. Here the first argument is not to be had the
    second time before the gradient of the result is.
    """
    if NAME == "jax":
        return _recomputed_by_jax(function)
    if NAME == "tensorflow":
        return _recomputed_by_tensorflow(function)
    return keras.remat(function)


def _recomputed_by_jax(function):
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


def _recomputed_by_tensorflow(function):
    import tensorflow as tf

    @tf.custom_gradient
    def call(*args):
        def backward(*upstream):
            again = [after(args[0], upstream[0]), *args[1:]]
            with tf.GradientTape() as tape:
                tape.watch([x for x in again if x.dtype.is_floating])
                results = keras.tree.flatten(function(*again))
            pairs = [pair for pair in zip(results, upstream, strict=True) if pair[0].dtype.is_floating]
            results, upstream = zip(*pairs, strict=True)
            return tape.gradient(results, again, output_gradients=upstream)

        return function(*args), backward

    # Called step by step, TensorFlow does nothing before its time, and a custom gradient would keep everything.
    return lambda *args: (keras.remat(function) if tf.executing_eagerly() else call)(*args)
