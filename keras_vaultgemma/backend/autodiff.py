"""Gradients, rematerialisation and loops."""

import functools

import keras

from keras_vaultgemma.backend.selection import NAME
from keras_vaultgemma.backend.tensors import schedule_after


def gradients(function, tensors):
    """Return the gradients of a scalar function with respect to tensors.

    Args:
        function: callable. Takes a list like `tensors` and returns `(scalar, aux)`, a float scalar
            and nested tensors.
        tensors: list of float tensors.

    Returns:
        Tuple `(gradients, aux)`. `gradients` is a list of tensors like `tensors`, zeros where the
        scalar does not depend on one.
    """
    if NAME == "jax":
        import jax

        return jax.grad(function, has_aux=True)(tensors)

    if NAME == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensors)
            scalar, aux = function(tensors)
        found = tape.gradient(scalar, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # The gradient of `tf.gather` is an `IndexedSlices`.
        return [tf.convert_to_tensor(gradient) for gradient in found], aux

    import torch

    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        scalar, aux = function(tensors)
        found = torch.autograd.grad(scalar, tensors, allow_unused=True)
    found = [
        torch.zeros_like(x) if gradient is None else gradient
        for gradient, x in zip(found, tensors, strict=True)
    ]
    return found, keras.tree.map_structure(lambda x: x.detach(), aux)


def multiply_no_nan(x, factors):
    """Return `x * factors`, with 0 where a factor is 0 even if `x` is not finite there.

    The caller must not use `x` again: PyTorch writes into it, and TensorFlow's own operation reuses
    the memory of an `x` that nothing else needs.
    """
    if NAME == "torch":
        return x.mul_(factors).masked_fill_(factors == 0, 0.0)
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.math.multiply_no_nan(x, factors)
    # Chosen after the product, so that XLA does not contract it with an addition that follows.
    return keras.ops.where(factors != 0, x * factors, 0.0)


def add_in_place(buffer, update):
    """Return `buffer + update` in the memory of `buffer`, which the caller must not use again.

    PyTorch adds in place; XLA reuses the memory of a loop variable.
    """
    return buffer.add_(update) if NAME == "torch" else buffer + update


def without_gradients(function):
    """Return `function` under `torch.no_grad` on PyTorch, and unchanged elsewhere."""
    if NAME != "torch":
        return function
    import torch

    return torch.no_grad()(function)


def fused(function):
    """Return `function`, compiled by XLA where it runs in a TensorFlow graph.

    `fit` runs TensorFlow's graphs operation by operation; compiled, elementwise operations read and
    write their tensors once. Keras compiles whole steps on JAX and nothing on PyTorch.

    Args:
        function: callable of tensors and Python values, without a gradient.
    """
    return _fused_in_graphs(function) if NAME == "tensorflow" else function


@functools.cache  # one executable for all layers
def _fused_in_graphs(function):
    import tensorflow as tf

    compiled = tf.function(function, jit_compile=True, autograph=False)
    return lambda *args, **kwargs: (function if tf.executing_eagerly() else compiled)(
        *args, **kwargs
    )


def remat(function, elementwise=False):
    """Return `function` such that only its arguments are saved for the backward pass.

    The backward pass recomputes the rest (rematerialisation). Only arguments get gradients.

    On JAX this is not `jax.checkpoint` (`keras.remat`), because XLA's CPU scheduler would recompute
    all layers as soon as their inputs exist, so that the intermediate values of all layers are in
    memory at once. Here the first argument of the recomputation depends on the gradient of the
    result.

    Args:
        function: callable of tensors, the first of them a float tensor.
        elementwise: bool. True if it is elementwise in all arguments, so that it and its gradient
            can be `fused`. Defaults to False.
    """
    if NAME == "tensorflow" and elementwise:
        return _remat_in_graphs(function)
    if NAME != "jax":
        return keras.remat(function)
    import jax

    @jax.custom_vjp
    def call(*args):
        return function(*args)

    def forward_pass(*args):
        return function(*args), args

    def backward_pass(args, upstream):
        first = schedule_after(args[0], jax.tree.leaves(upstream)[0])
        _, gradient = jax.vjp(function, first, *args[1:])
        return gradient(upstream)

    call.defvjp(forward_pass, backward_pass)
    return call


@functools.cache  # one executable for all layers
def _remat_in_graphs(function):
    import tensorflow as tf

    def gradient(args, upstream):
        with tf.GradientTape() as tape:
            tape.watch(args)
            result = function(*args)
        return tape.gradient(result, args, upstream)

    @tf.custom_gradient
    def call(*args):
        return fused(function)(*args), lambda upstream: fused(gradient)(args, upstream)

    return call


def block_size(most, expected):
    """Return the size of the blocks in which a loop handles elements whose number varies.

    Args:
        most: int. Largest size.
        expected: int. Expected number of elements.
    """
    if NAME == "jax":
        # `loop_in_blocks` handles one by one what is left of whole blocks, up to a block.
        return max(1, min(most, expected) // 2)
    # All fit into one block most often. Each block costs the time of starting its operations.
    return max(1, min(most, 2 * expected))


def rows_with_own_weights(most):
    """Return how many rows are best computed together, each with a copy of all weights.

    A step of private training of 4 layers and 64 rows takes, next to a plain one, on PyTorch 2.8
    times as long with one row and 1.8 with eight, on TensorFlow 2.4 and 1.8, and on JAX, whose loop
    over rows runs without Python, 1.3 and 1.9 (2 Intel cores).

    Args:
        most: int. Largest number.
    """
    return 1 if NAME == "jax" else most


def while_loop(condition, body, state):
    """Run `keras.ops.while_loop` with one iteration at a time.

    TensorFlow would start up to ten iterations in parallel and hold their intermediate values,
    which defeats a loop that exists to save memory.
    """
    if NAME != "tensorflow":
        return keras.ops.while_loop(condition, body, state)
    import tensorflow as tf

    return tf.while_loop(condition, body, state, parallel_iterations=1)


def loop_in_blocks(body, count, size, state, static_lengths=False):
    """Handle elements in blocks whose lengths add up to a number that is not known before.

    On PyTorch the blocks are equally long, as far as possible. On other backends blocks of the
    largest length come first. Where lengths are compiled, the elements that these leave over are
    handled one by one. Elsewhere, on TensorFlow, they are handled in blocks of powers of two,
    because what is `fused` is compiled once more for each new length, in 0.4 s or more for a model.

    Args:
        body: function of `(start, length, state)` that handles `length` elements from `start` on,
            and returns the next state. On TensorFlow `length` may be a tensor, unless `size` is 1.
        count: int32 scalar. Number of elements.
        size: int. Largest length of a block.
        state: nested tensors.
        static_lengths: bool. True if `length` must be an int. Defaults to False.

    Returns:
        The last state.
    """

    if NAME == "torch":
        start, count = 0, int(count)
        while start < count:
            left = count - start
            length = -(-left // -(-left // size))
            start, state = start + length, body(start, length, state)
        return state

    powers = [2**i for i in range(size.bit_length()) if 2**i < size]

    def longest(start):
        lengths = keras.ops.convert_to_tensor([*powers, size], "int32")
        return keras.ops.max(keras.ops.where(lengths <= count - start, lengths, 1))

    def loop_of(length, start, state):
        def step(start, state):
            each = longest(start) if length is None else length
            return start + each, body(start, each, state)

        return while_loop(lambda start, _: start <= count - (length or 1), step, (start, state))

    is_compiled = NAME == "jax" or static_lengths or size == 1
    start = keras.ops.zeros((), "int32")
    for length in dict.fromkeys((size, 1)) if is_compiled else (None,):
        start, state = loop_of(length, start, state)
    return state
