"""A tensor that stays in its file until it is asked for."""

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
"""The dtypes that weights may have, by Keras's names for them."""

BLOCK = 2**25
"""Bytes, in float32, that are read, cast and handed on at a time."""

STRIP = 2_000_000
"""Bytes of a file that a thread casts, checks and turns at a time.

Few enough to stay in a cache meanwhile; enough to be worth waiting for Python's lock, which the thread that builds the
model holds."""

ALIGNMENT = 64
"""Bytes. XLA and TensorFlow take over memory that begins at a multiple of it."""

THREADS = min(4, os.cpu_count() or 1)
"""More of them wait for memory rather than for a core."""


class LazyTensor:
    """One weight of a checkpoint; its bytes are read from the mapped file each time that they are asked for.

    Args:
        tensor: memory-mapped array, as the file has it.
        place: `Place` of the weight in the file.
        shape: of the backbone's variable.

    Attributes:
        name: of the tensor in the file.
        shape: of the backbone's variable.
        dtype: NumPy dtype in the file.
        is_finite: whether the value last read has neither NaN nor infinity; None before it is read.
    """

    def __init__(self, tensor, place, shape):
        self.name = place.name
        self.shape = shape
        self.dtype = tensor.dtype
        self.is_finite = None
        self._tensor = tensor
        self._place = place

    @property
    def nbytes(self):
        """Bytes in the file."""
        return self._tensor.nbytes

    def read(self, dtype=None):
        """The value as the backbone's variable has it: a contiguous array in memory of its own.

        Never a view of the file: JAX may use an array's memory as it is, and would change, or crash, with the file.
        That memory is aligned to `ALIGNMENT`, so that every backend can take it over without a copy.

        Args:
            dtype: Keras's name or a NumPy dtype to cast to. Defaults to the file's. Values beyond its range become
                infinite.
        """
        dtype = self.dtype if dtype is None else as_dtype(dtype)
        value = _aligned(self.shape, dtype)
        target = _bits(self._place.from_variable(value))
        # Whole lines of the cache in the turned tensor, too.
        rows = ALIGNMENT * max(1, STRIP // (ALIGNMENT * self._tensor[:1].nbytes))

        starts = range(0, len(target), rows)

        def fill(share):
            """Every so many strips; whether they are finite."""
            finite = True
            for start in starts[share::THREADS]:
                strip = self._tensor[start : start + rows]
                if dtype != self.dtype:
                    with np.errstate(over="ignore"):
                        strip = strip.astype(dtype)
                target[start : start + rows] = _bits(strip)
                finite = finite and _all_finite(strip)
            return finite

        if len(starts) < THREADS:
            finite = [fill(share) for share in range(THREADS)]
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                finite = list(pool.map(fill, range(THREADS)))
        self.is_finite = all(finite)
        return value

    def blocks(self, place, dtype):
        """The value as another file has it, in blocks of rows: contiguous arrays that may be views of this file.

        Args:
            place: `Place` of the weight in the other file.
            dtype: NumPy dtype to cast to.

        Raises:
            ValueError: where a finite value becomes infinite in `dtype`.
        """
        tensor = place.from_variable(self._place.to_variable(self._tensor, self.shape))
        # As if all were float32, so that blocks are the same rows in whatever dtype a file has them.
        rows = max(1, BLOCK // (4 * (tensor.size // len(tensor))))
        for start in range(0, len(tensor), rows):
            block = _contiguous(tensor[start : start + rows])
            if dtype != self.dtype:
                with np.errstate(over="ignore"):
                    source, block = block, block.astype(dtype)
                if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(self.dtype).max:
                    _check_range(self.name, source, block)
            yield block


def as_dtype(dtype):
    """A NumPy dtype, from Keras's name for it or from itself."""
    return DTYPES[dtype] if isinstance(dtype, str) else np.dtype(dtype)


def dtype_name(dtype):
    """Keras's name for a NumPy dtype that is one of `DTYPES`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def widest(dtypes):
    """The one of `DTYPES` into which all of some NumPy dtypes fit without rounding."""
    dtypes = set(dtypes)
    return dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]


def equal_bits(a, b):
    """Whether two arrays or mapped files of one shape and dtype hold the same bits, NaN included; block by block."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = _bits(a), _bits(b)
    rows = max(1, BLOCK // max(1, a[:1].nbytes))
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def as_bytes(array):
    """A contiguous array's bytes, without a copy."""
    return array.reshape(-1).view("u1").data


def _aligned(shape, dtype):
    """An array whose memory begins at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, "u1")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _all_finite(array):
    """Whether a contiguous array has neither NaN nor infinity.

    Of the numbers of either sign those have the largest bits; NumPy finds a maximum as fast as it reads memory.
    """
    size = array.dtype.itemsize
    infinity = int(np.array(np.inf, array.dtype).view(f"u{size}"))
    if array.view(f"i{size}").max() >= infinity:
        return False
    return bool(array.view(f"u{size}").max() < infinity + 2 ** (8 * size - 1))


def _bits(array):
    """The array as unsigned integers, which NumPy copies faster than bfloat16 and compares bit by bit."""
    return array.view(f"u{array.dtype.itemsize}")


def _contiguous(array):
    return np.ascontiguousarray(_bits(array)).view(array.dtype)


def _check_range(name, source, cast):
    lost = np.isinf(cast) & np.isfinite(source)
    if lost.any():
        value = float(np.abs(source[lost]).max())
        legal = float(ml_dtypes.finfo(cast.dtype).max)
        raise ValueError(
            f"{name} must be from {-legal:g} to {legal:g} for {cast.dtype}. Received: ±{value:g}"
        )
