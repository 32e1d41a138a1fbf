"""Conversion, update and comparison of tensors."""

import math

import keras
import numpy as np

from keras_vaultgemma.backend.selection import NAME


def from_numpy(array, layout=None):
    """Return a NumPy array as the initial value of a Keras variable, with few copies.

    PyTorch shares the array's memory (Keras would copy it, bfloat16 through float32), and so does
    TensorFlow where that starts at a multiple of 64 bytes (Keras and TensorFlow would each copy
    it). For JAX, Keras copies it once, because JAX cannot donate memory that it does not own: the
    first training step would hold all weights twice.

    Args:
        array: contiguous NumPy array that nothing else uses.
        layout: `jax.sharding.NamedSharding` of the variable, which Keras passes to an initializer
            if a distribution is set. Each device then gets its part alone, where Keras would put
            the whole array on one device first. Defaults to None.
    """
    if layout is not None:
        import jax

        mesh = jax.sharding.get_mesh()
        # Keras calls initializers inside `explicit_axes`, which accepts layouts of such a mesh
        # only.
        axis_types = (jax.sharding.AxisType.Explicit,) * len(mesh.axis_names)
        mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)
        sharding = jax.sharding.NamedSharding(mesh, layout.spec)
        # A copy, because a view of a part would hold the memory of the whole array.
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index].copy()
        )
    is_bfloat16 = array.dtype.name == "bfloat16"
    if NAME == "torch":
        import torch

        return (
            torch.from_numpy(array.view("int16")).view(torch.bfloat16)
            if is_bfloat16
            else torch.from_numpy(array)
        )
    if NAME == "tensorflow" and array.ctypes.data % 64 == 0:
        import tensorflow as tf

        tensor = tf.experimental.dlpack.from_dlpack(
            (array.view("uint16") if is_bfloat16 else array).__dlpack__()
        )
        return tf.bitcast(tensor, tf.bfloat16) if is_bfloat16 else tensor
    return array


def as_argument(array):
    """Return a NumPy array as an argument of a compiled function.

    On JAX that is the array itself, because its conversion to a tensor would compile a function for
    each new shape.
    """
    return array if NAME == "jax" else keras.ops.convert_to_tensor(array)


def zeros(shape):
    """Return float32 zeros, for the initial state of a loop.

    TensorFlow's graph optimizer turns `keras.ops.zeros` into a constant, which takes memory as long
    as the compiled function exists.
    """
    if NAME != "tensorflow":
        return keras.ops.zeros(shape, "float32")
    import tensorflow as tf

    return tf.raw_ops.Empty(shape=shape, dtype="float32", init=True)


def value_of(x):
    """Return a tensor, array or variable as a tensor.

    `keras.ops.convert_to_tensor` returns a variable of TensorFlow as it is, and takes three times
    as long on PyTorch.
    """
    if isinstance(x, keras.Variable):
        x = x.value
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(x)
    return x if keras.ops.is_tensor(x) else keras.ops.convert_to_tensor(x)


def known_length(x):
    """Return the size of the second axis of a tensor, or None if it is not known.

    In an export from JAX it is symbolic, which cannot be compared with a number.
    """
    return x.shape[1] if isinstance(x.shape[1], int) else None


def numpy_view(x):
    """Return a tensor or variable as a NumPy array, of the same memory if that is the host's.

    `keras.ops.convert_to_numpy` copies it on PyTorch. The caller must not write into the array.
    """
    x = value_of(x)
    if NAME != "torch":
        return np.asarray(x)
    x = x.detach()
    is_readable = x.device.type == "cpu" and keras.backend.standardize_dtype(x.dtype) != "bfloat16"
    return x.numpy() if is_readable else keras.ops.convert_to_numpy(x)


def reshape(x, shape):
    """Return `keras.ops.reshape(x, shape)` for a tensor that is not symbolic.

    Keras takes 30 µs to look for symbolic tensors in the shape, 200 times a token on PyTorch.
    """
    return keras.ops.reshape(x, shape) if NAME == "tensorflow" else x.reshape(shape)


def rms_normalize(x, epsilon):
    """Return `x` divided by its root mean square over the last axis.

    On PyTorch this is one operation instead of five, 53 times a token.

    Args:
        x: float32 tensor [..., D].
        epsilon: float. Added to the mean square.
    """
    if NAME == "torch":
        import torch

        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=epsilon)
    mean_square = keras.ops.mean(x * x, axis=-1, keepdims=True)
    return x * keras.ops.rsqrt(mean_square + epsilon)


def is_argmax(x, index):
    """Return True for each row where `index` is the argmax, the first of equal values.

    For 256,000 values on 2 CPU cores, XLA's argmax takes three times as long as the comparisons
    here. PyTorch's takes as long as five of its passes over the values, so it is computed for those
    rows alone where the value is the largest.

    Args:
        x: tensor [N, V].
        index: int tensor [N].

    Returns:
        bool tensor [N].
    """
    index = index[:, None]
    if NAME == "torch":
        found = x.gather(1, index.long())[:, 0] == x.amax(dim=1)
        found[found.clone()] = x[found].argmax(dim=1) == index[found, 0]
        return found
    chosen = keras.ops.take_along_axis(x, index, axis=1)
    is_earlier = keras.ops.arange(x.shape[1], dtype=index.dtype) < index
    return ~keras.ops.any(keras.ops.where(is_earlier, x >= chosen, x > chosen), axis=1)


def log_softmax(x):
    """Compute `keras.ops.log_softmax` of each row, in fewer passes over the values.

    XLA computes the difference of a value and its normalizer again wherever it is used, so that it
    is never stored. PyTorch has one operation for all of it.

    Args:
        x: float tensor [N, V].
    """
    if NAME == "torch":
        return keras.ops.log_softmax(x, axis=1)
    return x - keras.ops.logsumexp(x, axis=1, keepdims=True)


def top_k(x, k):
    """Return the k largest values of each row and their indices, like `keras.ops.top_k`.

    XLA's CPU compiler sorts whole rows on TensorFlow, and on JAX as soon as a part of the result is
    used: 80 to 95 ms for a vocabulary of 256,000 (2 Intel cores). Here it sorts about 2 √(k V)
    values, in less than 1 ms: the k largest values are in the k groups with the largest maxima.

    Args:
        x: float tensor [N, V].
        k: int from 1 to V.

    Returns:
        Tuple of tensors [N, k]: the values from the largest down, and their indices, int32. Of
        equal values, the one with the smaller index comes first (JAX, TensorFlow).
    """
    ops, size = keras.ops, x.shape[1]
    width = math.isqrt(size // k)
    if NAME == "torch" or width == 1:
        values, indices = ops.top_k(x, k)
        return values, ops.cast(indices, "int32")
    count = -(-size // width)
    padded = ops.pad(x, ((0, 0), (0, count * width - size)), constant_values=float("-inf"))
    groups = ops.reshape(padded, (-1, count, width))
    _, chosen = ops.top_k(ops.max(groups, axis=2), k)
    chosen = ops.sort(chosen, axis=1)  # so that equal values keep their order
    candidates = ops.take_along_axis(groups, chosen[:, :, None], axis=1)
    values, places = ops.top_k(ops.reshape(candidates, (-1, k * width)), k)
    indices = ops.take_along_axis(chosen, places // width, axis=1) * width + places % width
    return values, ops.cast(indices, "int32")


def add_at(x, index, values):
    """Add a value to one element of each row.

    Args:
        x: tensor [N, V]. PyTorch writes into it.
        index: int tensor [N].
        values: tensor [N].

    Returns:
        Tensor [N, V].
    """
    if NAME == "torch":
        return x.scatter_add_(1, index[:, None].long(), values[:, None])
    is_chosen = keras.ops.arange(x.shape[1], dtype=index.dtype)[None] == index[:, None]
    return x + keras.ops.where(is_chosen, values[:, None], 0.0)


def schedule_after(x, other):
    """Return `x`, such that nothing is computed from it before `other` has been computed.

    XLA computes early whatever has its inputs, at any cost of memory, and its CPU compiler removes
    barriers.

    Args:
        x: tensor.
        other: float tensor.
    """
    if NAME == "torch":
        return x
    # This adds 0, which XLA cannot know, even if `other` is not finite: in private training the
    # values of one row must not depend on another.
    return x + keras.ops.cast(keras.ops.reshape(other, (-1,))[0] > float("inf"), x.dtype)


def write_slice(buffer, update, start):
    """Write `update` into `buffer` from index `start` of the second axis, and return the result.

    PyTorch writes in place, where Keras's `slice_update` would copy the whole buffer for every
    token and layer. XLA reuses the memory of a loop variable or a donated argument.

    Args:
        buffer: tensor [N, S, ...]. The caller must not use it again.
        update: tensor [N, T, ...] with T at most S.
        start: int scalar.
    """
    if NAME == "torch":
        import torch

        # Because rows of a broadcast tensor share memory.
        buffer = buffer.contiguous()
        # `start` stays a tensor, because a GPU would have to finish its work to return a number.
        index = torch.as_tensor(start, dtype=torch.int64, device=buffer.device).reshape(1)
        if update.shape[1] != 1:
            index = index + torch.arange(update.shape[1], device=buffer.device)
        return buffer.index_copy_(1, index, update)
    zero = start * 0  # because JAX with 64-bit integers needs indices of one dtype
    return keras.ops.slice_update(buffer, [zero, start, *[zero] * (len(buffer.shape) - 2)], update)


def write_rows(buffer, update, rows):
    """Write `update` into rows of `buffer`, and return the result.

    PyTorch writes in place, where Keras's `scatter_update` would copy the whole buffer.

    Args:
        buffer: tensor [N, ...]. The caller must not use it again.
        update: tensor [n, ...].
        rows: int tensor [n].
    """
    if NAME == "torch":
        return buffer.index_copy_(0, rows.long(), update)
    return keras.ops.scatter_update(buffer, rows[:, None], update)
