"""Gradients of a function of tensors, outside what Keras's own train steps differentiate."""

import contextvars
import functools

import keras

from keras_vaultgemma.backend.selection import NAME
from keras_vaultgemma.backend.tensors import schedule_after, value_of

_TAPE = contextvars.ContextVar("tape", default=None)
"""Of `gradients` on TensorFlow, for `looked_up`: (tape, its graph, tensors, list of (number of one, ids, rows))."""


def gradients(function, tensors, jit_compile=False):
    """The gradients of a scalar with respect to tensors.

    Args:
        function: takes a list like `tensors`, returns a pair of a float scalar and nested tensors.
        tensors: list of float tensors.
        jit_compile: whether XLA compiles the caller on TensorFlow.

    Returns:
        `(gradients, nested tensors)`: a list of tensors like `tensors`, 0 where the scalar does not depend on one.
    """
    if NAME == "jax":
        import jax

        return jax.grad(function, has_aux=True)(tensors)

    if NAME == "tensorflow":
        import tensorflow as tf

        lookups = []
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensors)
            token = _TAPE.set(
                None if jit_compile else (tape, tf.compat.v1.get_default_graph(), tensors, lookups)
            )
            try:
                scalar, others = function(tensors)
            finally:
                _TAPE.reset(token)
        sources = [*tensors, *[rows for _, _, rows in lookups]]
        found = tape.gradient(scalar, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # Where `function` looks rows up by itself, their gradient is a list of rows.
        found, of_rows = (
            [tf.convert_to_tensor(x) for x in found[: len(tensors)]],
            found[len(tensors) :],
        )
        for (i, ids, _), rows in zip(lookups, of_rows, strict=True):
            # What `after` returns is nothing else's memory.
            rows = tf.reshape(rows, (-1, rows.shape[-1]))
            found[i] = tf.raw_ops.InplaceAdd(
                x=schedule_after(found[i], rows), i=tf.reshape(ids, (-1,)), v=rows
            )
        return found, others

    import torch

    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        scalar, others = function(tensors)
        found = torch.autograd.grad(scalar, tensors, allow_unused=True)
    found = [
        torch.zeros_like(x) if gradient is None else gradient
        for gradient, x in zip(found, tensors, strict=True)
    ]
    return found, keras.tree.map_structure(lambda x: x.detach(), others)


def looked_up(table, ids):
    """Rows `ids` [...] of `table` [V, D], in `gradients` on TensorFlow with a gradient that takes no more memory.

    TensorFlow would make the rows' gradient a tensor as large as the table before it adds that of the table's other
    uses, and copies what `tf.tensor_scatter_nd_add` adds to.
    """
    import tensorflow as tf

    value = value_of(table)
    tape, graph, tensors, lookups = _TAPE.get() or (None, None, (), [])
    number = next((i for i, tensor in enumerate(tensors) if tensor is value), None)
    # Of a function within the graph, as of a loop, no tensor can be had out here.
    if number is None or graph is not tf.compat.v1.get_default_graph():
        return keras.ops.take(table, ids, axis=0)
    rows = tf.gather(tf.stop_gradient(value), ids)
    tape.watch(rows)
    lookups.append((number, ids, rows))
    return rows


def multiply_no_nan(x, factors):
    """`x * factors`, but 0 where a factor is 0, though `x` were not finite there.

    TensorFlow's own operation for this writes into the memory of an `x` that nothing else needs.
    """
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.math.multiply_no_nan(x, factors)
    return keras.ops.where(factors != 0, x, 0.0) * factors


def add_in_place(buffer, update):
    """`buffer + update` in the memory of `buffer`, which is consumed: PyTorch adds in place, XLA reuses it in loops."""
    return buffer.add_(update) if NAME == "torch" else buffer + update


def without_gradients(function):
    """`function` as it runs on PyTorch without keeping anything for a backward pass; elsewhere unchanged."""
    if NAME != "torch":
        return function
    import torch

    return torch.no_grad()(function)


# MERGED: """What the backward pass computes again instead of keeping it, and operations that are compiled into one."""
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


def remat(function, elementwise=False):
    """`function` of tensors, of which nothing but the arguments is kept for its gradient; that computes it again.

    What gets a gradient must be an argument. On JAX this is not `jax.checkpoint` (Keras's `remat`): there nothing keeps
    the second computation from being done long before its gradient is asked for, and XLA's CPU scheduler, which looks
    for work that can be done at once, does so: all layers' intermediate values are then in memory together. Here the
    first argument, a float, is not to be had the second time before the gradient of the result is.

    Args:
        elementwise: whether it is elementwise in all its arguments, so that it and its gradient can be `fused`.
    """
    if NAME == "tensorflow" and elementwise:
        return _remat_in_graphs(function)
    if NAME != "jax":
        return keras.remat(function)
    import jax

    @jax.custom_vjp
    def call(*args):
        return function(*args)

    def first_pass(*args):
        return function(*args), args

    def backward(args, upstream):
        first = schedule_after(args[0], jax.tree.leaves(upstream)[0])
        _, gradient = jax.vjp(function, first, *args[1:])
        return gradient(upstream)

    call.defvjp(first_pass, backward)
    return call


@functools.cache
def _remat_in_graphs(function):
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


# MERGED: """Loops whose iterations do not overlap."""
def while_loop(condition, body, state):
    """As `keras.ops.while_loop`, one iteration after the other.

    TensorFlow would begin as many as ten at once, each as far as it waits for nothing from the one before, and keep
    what they have computed: of a loop that saves memory nothing would be left.
    """
    if NAME != "tensorflow":
        return keras.ops.while_loop(condition, body, state)
    import tensorflow as tf

    return tf.while_loop(condition, body, state, parallel_iterations=1)
