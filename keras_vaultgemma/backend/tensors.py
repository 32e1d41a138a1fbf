"""Values in and out of tensors without detours."""

import keras

from keras_vaultgemma.backend.selection import NAME


def from_numpy(array, layout=None):
    """A contiguous array in memory of its own as what a Keras variable starts from, without a detour.

    PyTorch takes the array's memory over (Keras would copy it, bfloat16 by way of float32), and TensorFlow does where
    that begins at a multiple of 64 bytes (Keras and TensorFlow would each copy it). For JAX, Keras copies it once, and
    should: JAX cannot donate memory that is not its own, so the first step of training would have all weights twice.

    Args:
        layout: the variable's `jax.sharding.NamedSharding`, which Keras hands to an initializer while a distribution is
            set. Each device then gets its own part alone. (Keras itself would put the whole array on one device first,
            or make it a constant of a compiled program.)
    """
    if layout is not None:
        import jax

        mesh = jax.sharding.get_mesh()
        # Keras asks from inside `explicit_axes`, which knows layouts of such a mesh only.
        axis_types = (jax.sharding.AxisType.Explicit,) * len(mesh.axis_names)
        mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)
        sharding = jax.sharding.NamedSharding(mesh, layout.spec)
        # A copy of the part, for a view would keep the whole.
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
    """A NumPy array as an argument of a compiled function.

    On JAX the array itself: made a tensor by itself, each new shape would compile a program of its own.
    """
    return array if NAME == "jax" else keras.ops.convert_to_tensor(array)


def zeros(shape):
    """float32 zeros, for a loop to begin with.

    Of `keras.ops.zeros` TensorFlow's graph optimizer makes a constant, which takes its memory as long as the compiled
    function lives, whatever its size.
    """
    if NAME != "tensorflow":
        return keras.ops.zeros(shape, "float32")
    import tensorflow as tf

    return tf.raw_ops.Empty(shape=shape, dtype="float32", init=True)


def value_of(x):
    """A tensor, for a tensor, array or variable. (Of TensorFlow's variables Keras would return the variable.)"""
    x = keras.ops.convert_to_tensor(x)
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(x)
    return x


def is_argmax(x, index):
    """Whether `index` [N] is the argmax of each row of `x` [N, V], the first of equal ones.

    XLA's argmax for CPUs takes three times as long as two comparisons and an "or" over the row (256,000 numbers, 2
    cores), PyTorch's half as long.
    """
    if NAME == "torch":
        return keras.ops.argmax(x, axis=1) == index
    index = index[:, None]
    chosen = keras.ops.take_along_axis(x, index, axis=1)
    is_earlier = keras.ops.arange(x.shape[1], dtype=index.dtype) < index
    return ~keras.ops.any(keras.ops.where(is_earlier, x >= chosen, x > chosen), axis=1)


def schedule_after(x, other):
    """`x`, but not before the float tensor `other` has been computed, nor what is made from `x`.

    XLA computes early what waits for nothing, whatever memory that takes, and its CPU compiler drops barriers.
    """
    if NAME == "torch":
        return x
    # 0, which XLA cannot know. Also where `other` is not finite: in private training one row must not touch another.
    return x + keras.ops.cast(keras.ops.reshape(other, (-1,))[0] > float("inf"), x.dtype)


def write_slice(buffer, update, start):
    """Write `update` into `buffer` from position `start` of the second axis, and return the result.

    The buffer is consumed: PyTorch writes in place (Keras's `slice_update` would copy the whole buffer for every token
    and layer), XLA reuses the memory of a loop variable or a donated argument.

    Args:
        buffer, update: of the same shape but for that axis, along which the update is no longer.
    """
    if NAME == "torch":
        import torch

        # What comes out of `repeat` may have rows that share memory.
        buffer = buffer.contiguous()
        # Of a tensor no number is made, so that a recording of this is good for every start (`compile_step`).
        index = torch.as_tensor(start, dtype=torch.int64, device=buffer.device).reshape(1)
        if update.shape[1] != 1:
            index = index + torch.arange(update.shape[1], device=buffer.device)
        return buffer.index_copy_(1, index, update)
    return keras.ops.slice_update(buffer, [0, start, *[0] * (len(buffer.shape) - 2)], update)
