"""Elementwise arithmetic on tensors that are too large to be computed operation by operation."""

import math
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

from keras_vaultgemma.backend.autodiff import fused
from keras_vaultgemma.backend.selection import NAME

BLOCK = 2**17
"""Elements of PyTorch's blocks on a CPU, whose temporaries fit into the cache of a core."""

GPU_BLOCK = 2**24
"""Elements of PyTorch's blocks on a GPU, whose 64 MiB for each temporary keep it busy."""


def in_blocks(function, buffers, *args, **parameters):
    """Return `function(start, *buffers, *args)`, reading and writing large tensors once.

    XLA fuses the operations on JAX and, by `fused`, on TensorFlow, and there is one block. PyTorch
    computes operation by operation, block by block, and writes the result over the buffers: on a
    CPU within the cache, in all threads; on a GPU so that temporaries take little memory.

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
    if NAME != "torch":
        return fused(function)(0, *buffers, *args, **parameters)
    import torch

    shape, size = buffers[0].shape, buffers[0].numel()
    is_cpu = buffers[0].device.type == "cpu"
    length = BLOCK if is_cpu else GPU_BLOCK
    flat = [x.reshape(-1) for x in buffers]
    args = [x.reshape(*x.shape[: x.ndim - len(shape)], -1) for x in args]

    @torch.no_grad()  # which holds for one thread
    def compute(start):
        part = slice(start, start + length)
        parts = [x[..., part] for x in [*flat, *args]]
        results = function(start, *parts, **parameters)
        for x, result in zip(flat, results, strict=True):
            x[part] = result

    starts = range(0, max(1, size), length)
    if len(starts) == 1 or not is_cpu:
        for start in starts:
            compute(start)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for _ in threads.map(compute, starts):
                pass
    return tuple(x.view(shape) for x in flat)


def in_row_blocks(function, x, *args, **parameters):
    """Return `function(x, *args)`, reading and writing a large matrix once.

    As in `in_blocks`, XLA fuses the operations, and PyTorch computes on a CPU some rows at a time,
    within the cache, and writes over `x`.

    Args:
        function: callable of rows and of arguments, computed row by row. It returns a tuple, of
            which the last is a tensor like `x`, or None, and the others have a value for each row.
        x: tensor [N, V]. The caller must not use it again.
        *args: tensors [N].
        **parameters: more arguments of `function`.

    Returns:
        Tuple like that of `function`.
    """
    rows = max(1, BLOCK // x.shape[1])
    if NAME != "torch" or x.device.type != "cpu" or len(x) <= rows:
        return fused(function)(x, *args, **parameters)
    import torch

    parts = []
    for block in zip(*(torch.split(t, rows) for t in (x, *args)), strict=True):
        *values, result = function(*block, **parameters)
        if result is not None:
            block[0].copy_(result)
        parts.append(values)
    return (*map(torch.cat, zip(*parts, strict=True)), None if result is None else x)


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
