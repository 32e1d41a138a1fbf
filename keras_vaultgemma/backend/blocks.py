"""Elementwise arithmetic on tensors that are too large to be computed operation by operation."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

from keras_vaultgemma.backend.autodiff import fused
from keras_vaultgemma.backend.selection import NAME

BLOCK = 2**17
"""Elements of PyTorch's blocks, whose temporaries fit into the cache of a core."""

PART = 2**20
"""Smallest number of elements that TensorFlow computes in a thread of its own."""


def in_blocks(function, buffers, *args, **parameters):
    """Return `function(start, *buffers, *args)`, computed in blocks by all threads.

    PyTorch computes a block operation by operation within the cache, and writes the result over the
    buffers. TensorFlow fuses the operations, for one thread a block. JAX does both by itself, and
    there is one block.

    Args:
        function: callable of the index of a block's first element, of buffers and of arguments. It
            returns a tuple of tensors like the buffers, and is elementwise, except that it may
            depend on the `positions` of elements.
        buffers: list of tensors of one shape. The caller must not use them again.
        *args: tensors of that shape, which may have more axes in front.
        **parameters: more arguments of `function`, which every block gets whole.

    Returns:
        Tuple of tensors like `buffers`.
    """
    if NAME == "jax":
        return function(0, *buffers, *args, **parameters)
    shape = buffers[0].shape
    size = math.prod(shape)
    flat = [keras.ops.reshape(x, (-1,)) for x in buffers]
    args = [keras.ops.reshape(x, (*x.shape[: len(x.shape) - len(shape)], -1)) for x in args]
    if NAME == "tensorflow":
        threads = os.cpu_count() or 1
        length = max(PART, -(-size // threads))
        parts = [
            fused(function)(
                start, *[x[..., start : start + length] for x in [*flat, *args]], **parameters
            )
            for start in range(0, size, length)
        ]
        columns = zip(*parts, strict=True)
        return tuple(keras.ops.reshape(keras.ops.concatenate(column), shape) for column in columns)
    import torch

    @torch.no_grad()  # which holds for one thread
    def compute(start):
        part = slice(start, start + BLOCK)
        parts = [x[..., part] for x in [*flat, *args]]
        results = function(start, *parts, **parameters)
        for x, result in zip(flat, results, strict=True):
            x[part] = result

    if size <= BLOCK:
        compute(0)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for _ in threads.map(compute, range(0, size, BLOCK)):
                pass
    return tuple(x.view(shape) for x in flat)


def positions(start, shape):
    """Return the index of each element of a block of `in_blocks`, int32.

    Args:
        start: int. Index of the first element.
        shape: tuple of ints.
    """
    size = math.prod(shape)
    return keras.ops.reshape(keras.ops.arange(start, start + size, dtype="int32"), shape)


def add_float64_noise(start, total, rest, seed, deviation):
    """Return `total + rest + deviation * z`, by float64, on PyTorch's CPU, and None elsewhere.

    The deviates z are NumPy's. PyTorch's own generator reads 32 bits of a seed on a CPU, and any
    other takes ten times as long when it is computed operation by operation.

    Args:
        start: int. Index of the first element of the block of `in_blocks`.
        total, rest: float32 tensors of one shape.
        seed: int32 tensor [4].
        deviation: float32 scalar.

    Returns:
        float32 tensor, rounded once.
    """
    if NAME != "torch" or total.device.type != "cpu":
        return None
    import torch

    key = np.ascontiguousarray(seed.numpy()).view("<u8")
    # Philox counts in the first word, so that the second one keeps blocks apart.
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, start, 0, 0]))
    deviates = torch.from_numpy(np.asarray(generator.standard_normal(tuple(total.shape))))
    return deviates.mul_(deviation).add_(rest).add_(total).to(torch.float32)


def rotate_left(x, bits):
    """Return int32 `x`, rotated by 1 to 31 bits."""
    if NAME == "tensorflow":
        import tensorflow as tf

        high, low = tf.bitwise.left_shift(x, bits), tf.bitwise.right_shift(x, 32 - bits)
    else:
        high, low = x << bits, x >> (32 - bits)
    return high | (low & ((1 << bits) - 1))
