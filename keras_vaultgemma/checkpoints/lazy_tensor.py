"""A tensor of a checkpoint that stays in its memory-mapped file until it is read."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""NumPy dtype of each legal weight dtype, by its Keras name."""

READABLE = (*DTYPES.values(), np.dtype("<f8"))
"""NumPy dtypes of files. Scripts that average checkpoints in NumPy write float64."""

BLOCK_BYTES = 2**25
"""Largest size of one block of `LazyTensor.blocks`, in bytes of float32."""

STRIP_BYTES = 2_000_000
"""Bytes of a file that one thread casts, checks and transposes at a time.

Small enough to stay in a core's cache, because each strip is read up to three times."""

ALIGNMENT = 64
"""Bytes. XLA and TensorFlow adopt memory without a copy only if it starts at a multiple of this."""

THREADS = min(4, os.cpu_count() or 1)
"""Threads of one read. More would wait for memory bandwidth rather than for a core."""


class LazyTensor:
    """One weight of a checkpoint, which is read from its memory-mapped file on request.

    Args:
        tensor: memory-mapped NumPy array, in the layout of the file.
        location: `Location` of the weight in the file.
        shape: tuple of ints. Shape of the backbone's variable.

    Attributes:
        name: string. Name of the tensor in the file.
        shape: tuple of ints. Shape of the backbone's variable.
        dtype: NumPy dtype of the file.
        is_finite: bool. True if the value that was last read has no NaN and no infinity. None
            before the first read.
    """

    def __init__(self, tensor, location, shape):
        self.name = location.name
        self.shape = shape
        self.dtype = tensor.dtype
        self.is_finite = None
        self._tensor = tensor
        self._location = location

    def read(self, dtype=None):
        """Return the value of the backbone's variable as a new, contiguous array.

        The result is never a view of the file, because JAX may adopt an array's memory: a change
        of the file would then change the model or crash it. It is aligned to `ALIGNMENT`, so that
        every backend can adopt it without a copy.

        Args:
            dtype: string or NumPy dtype to cast to. Values out of its range become infinite.
                Defaults to the dtype of the file.

        Returns:
            NumPy array of `self.shape`. `is_finite` then describes it.
        """
        dtype = self.dtype if dtype is None else as_dtype(dtype)
        value = _aligned(self.shape, dtype)
        target = _bits(self._location.from_variable(value))
        # A multiple of the cache line, so that no two threads write to one line of the
        # transposed array.
        rows = ALIGNMENT * max(1, STRIP_BYTES // (ALIGNMENT * self._tensor[:1].nbytes))
        starts = range(0, len(target), rows)

        def copy_strips(thread):
            """Copy every `THREADS`-th strip. Return True if all of them are finite."""
            finite = True
            for start in starts[thread::THREADS]:
                strip = self._tensor[start : start + rows]
                if dtype != self.dtype:
                    with np.errstate(over="ignore"):
                        strip = strip.astype(dtype)
                target[start : start + rows] = _bits(strip)
                finite = finite and _all_finite(strip)
            return finite

        if len(starts) < THREADS:
            finite = [copy_strips(thread) for thread in range(THREADS)]
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                finite = list(pool.map(copy_strips, range(THREADS)))
        self.is_finite = all(finite)
        return value

    def blocks(self, location, dtype):
        """Yield the value in the layout of another file, in blocks of rows.

        Args:
            location: `Location` of the weight in the other file.
            dtype: NumPy dtype to cast to.

        Yields:
            Contiguous arrays, which may be views of this tensor's file.

        Raises:
            ValueError: If a finite value becomes infinite in `dtype`.
        """
        tensor = location.from_variable(self._location.to_variable(self._tensor, self.shape))
        # Counted in float32, so that a block has the same rows whatever the dtype of the file.
        rows = max(1, BLOCK_BYTES // (4 * (tensor.size // len(tensor))))
        for start in range(0, len(tensor), rows):
            block = _contiguous(tensor[start : start + rows])
            if dtype != self.dtype:
                with np.errstate(over="ignore"):
                    source, block = block, block.astype(dtype)
                if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(self.dtype).max:
                    _check_range(self.name, source, block)
            yield block


def as_dtype(dtype):
    """Return the NumPy dtype of a Keras dtype name. A NumPy dtype is returned as it is."""
    return DTYPES[dtype] if isinstance(dtype, str) else np.dtype(dtype)


def dtype_name(dtype):
    """Return the Keras name of one of `DTYPES`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def widest(dtypes):
    """Return the narrowest of `DTYPES` that holds all the given dtypes of files.

    float64 is rounded to float32, because no model is trained in float64. Nothing else is rounded.
    """
    dtypes = set(dtypes)
    if len(dtypes) == 1 and dtypes <= set(DTYPES.values()):
        return dtypes.pop()
    return DTYPES["float32"]


def equal_bits(a, b):
    """Return True if two arrays have the same shape, dtype and bits. NaN equals the same NaN.

    Both may be memory-mapped; they are compared in blocks.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = _bits(a), _bits(b)
    rows = max(1, BLOCK_BYTES // max(1, a[:1].nbytes))
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def as_bytes(array):
    """Return the bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view("u1").data


def check_bits(name, blocks, data, report):
    """Raise ValueError, which names a tensor, unless a file has its bytes.

    Args:
        name: string.
        blocks: iterable of contiguous arrays, which are the tensor.
        data: uint8 array [n] of the file, or None if it has no such tensor.
        report: callable. Called with the number of bytes of each block that is compared.
    """
    start, is_equal = 0, data is not None
    for block in blocks if is_equal else ():
        end = start + block.nbytes
        is_equal = is_equal and np.array_equal(data[start:end], block.reshape(-1).view("u1"))
        start = end
        report(block.nbytes)
    if not is_equal or start != len(data):
        raise ValueError(
            f"{name} must have the same bits in source and target. Received: different bits"
        )


def _aligned(shape, dtype):
    """Return an uninitialised array whose memory starts at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, "u1")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _all_finite(array):
    """Return True if a contiguous array has no NaN and no infinity.

    Compared as integers, infinity and NaN are the largest values of either sign, and NumPy
    computes an integer maximum at the speed of memory in every one of `DTYPES`.
    """
    size = array.dtype.itemsize
    infinity = int(np.array(np.inf, array.dtype).view(f"u{size}"))
    if array.view(f"i{size}").max() >= infinity:
        return False
    return bool(array.view(f"u{size}").max() < infinity + 2 ** (8 * size - 1))


def _bits(array):
    """Return a view as unsigned integers, which NumPy copies faster than bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")


def _contiguous(array):
    return np.ascontiguousarray(_bits(array)).view(array.dtype)


def _check_range(name, source, cast):
    overflowed = np.isinf(cast) & np.isfinite(source)
    if overflowed.any():
        value = float(np.abs(source[overflowed]).max())
        legal = float(ml_dtypes.finfo(cast.dtype).max)
        raise ValueError(
            f"{name} must be from {-legal:g} to {legal:g} for {cast.dtype}. Received: ±{value:g}"
        )
