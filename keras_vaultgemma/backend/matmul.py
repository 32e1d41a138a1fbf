"""Products with a matrix of weights, by the fastest routine of each backend."""

import functools
import platform
from pathlib import Path

import keras

from keras_vaultgemma.backend.autodiff import looked_up
from keras_vaultgemma.backend.selection import NAME

ROWS, LANES = 16, 32
"""Rows of an int8 matrix that JAX's CPU adds up in one go for a single row of `x`, and columns of a transposed one."""

EXACT_PRODUCTS = 2**24 // 128**2
"""Products of two int8 numbers whose sum is exact in float32, in any order."""

MOST_FEW_ROWS = 64
"""Rows of `x` up to which a product is faster on a CPU with the matrix first."""

LONGEST_ROW = 2**13
"""Numbers of a row of int8 at most: a transposed matrix has a term for each `LANES` of them to compile."""


ATTENDS_IN_ONE = NAME == "torch"
"""Whether `keras.ops.dot_product_attention` is one operation, which keeps no scores and reads keys as they lie."""


def matmul(x, kernel, transposed=False):
    """`x` [..., in] times `kernel` [in, out], in their dtype, by the fastest routine of this backend for few rows.

    A matrix [out, in] is the faster one for few rows. On JAX's and TensorFlow's CPU it then stands first, [out, in] by
    [in, rows]: that reads 15 to 20 GB/s of float32 weights for 8 rows, and `x` first 8 to 11 in either layout (2 Intel
    cores). A single row reads 25 to 28 GB/s of a matrix [1152, 6912], and 15 to 18 of its transpose.

    On PyTorch's CPU this is oneDNN where no gradient is asked for: it reads 35 to 45 GB/s of float32 weights where MKL,
    which `torch.matmul` calls, reads 18 to 27 (2 AMD cores), in either layout. On Intel's MKL is the faster one for a
    single row, 25 to 27 GB/s and not 19 to 22, and the slower one for 8 rows or more. On JAX's CPU, 16-bit products are
    asked for in float32, and for two rows or more: only so does XLA multiply 16-bit weights without a float32 copy of
    them.

    Args:
        transposed: whether `kernel` is [out, in] instead.
    """
    if NAME == "torch" and not _takes_gradients() and _has_onednn(x, kernel) and not _suits_mkl(x):
        import torch

        rows, weight = x.reshape(-1, x.shape[-1]), kernel if transposed else kernel.t()
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
        return product.reshape(*x.shape[:-1], weight.shape[0])
    if NAME == "jax" and x.dtype.itemsize == 2 and _is_jax_cpu():
        return _jax_matmul(x, kernel, transposed, "float32", least_rows=2).astype(x.dtype)
    if NAME == "jax" and transposed:
        # XLA would copy a transposed operand.
        return _jax_matmul(x, kernel, transposed, x.dtype)
    if NAME == "tensorflow" and transposed and x.dtype == kernel.dtype:
        return _tensorflow_matmul(x, kernel)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def expanded(x, kernel):
    """`x` [..., r] times `kernel` [r, out], or [B, T, r] times [B, r, out], for an r that is small.

    On JAX the kernel's gradient turns `x` round and not the gradient of the product, as JAX's own does: XLA's CPU then
    takes a tenth of a step for that, in training adapters of small models.
    """
    return _jax_expanded()(x, kernel) if NAME == "jax" else matmul(x, kernel)


@functools.cache
def _jax_expanded():
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def product(x, kernel):
        return matmul(x, kernel)

    def gradients(values, upstream):
        x, kernel = values
        rows = x if kernel.ndim == 3 else x.reshape(-1, x.shape[-1])
        of_rows = upstream if kernel.ndim == 3 else upstream.reshape(-1, upstream.shape[-1])
        return jnp.matmul(upstream, jnp.swapaxes(kernel, -1, -2)), jnp.matmul(
            jnp.swapaxes(rows, -1, -2), of_rows
        )

    product.defvjp(lambda *values: (product(*values), values), gradients)
    return product


def take_rows(table, ids):
    """Rows `ids` [...] of `table` [V, D]: [..., D]."""
    if NAME == "jax" and table.dtype.itemsize == 2 and _is_jax_cpu():
        # Else XLA would, before a loop over ids, make a float32 copy of the table, as it widens 16-bit numbers to move.
        ids, table = _barrier(ids, table)
    return looked_up(table, ids) if NAME == "tensorflow" else keras.ops.take(table, ids, axis=0)


def int8_matmul(x, kernel, transposed=False):
    """`matmul` of int8 and int8 to int32; has no gradient."""
    if NAME == "torch" and kernel.device.type == "cpu":
        import torch

        kernel = kernel.t() if transposed else kernel
        return torch._int_mm(x.reshape(-1, x.shape[-1]), kernel).reshape(
            *x.shape[:-1], kernel.shape[1]
        )
    if NAME == "jax" and _is_jax_cpu():
        if _is_short_row(x, LANES if transposed else ROWS):
            return _jax_transposed_int8_row(x, kernel) if transposed else _jax_int8_row(x, kernel)
        return _jax_matmul(x, kernel, transposed, "int32", least_rows=2)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def _is_short_row(x, divisor):
    size = x.shape[-1]
    return x.size == size and size % divisor == 0 and size <= LONGEST_ROW


def _tensorflow_matmul(x, kernel):
    """`x` [..., in] times `kernel` [out, in]."""
    import tensorflow as tf

    rows = tf.reshape(x, (-1, kernel.shape[1]))
    count, (out, size) = rows.shape[0], kernel.shape
    if count and 1 < count <= MOST_FEW_ROWS and out % 2 == 0 and not _has_tensorflow_gpu():
        # Two halves: else XLA would turn the product round, and without XLA it is slower.
        product = tf.matmul(
            tf.reshape(kernel, (2, -1, size)), tf.stack([rows, rows]), transpose_b=True
        )
        product = tf.transpose(product, (2, 0, 1))
    else:
        product = tf.matmul(rows, kernel, transpose_b=True)
    return tf.reshape(product, (*keras.ops.shape(x)[:-1], out))


def _jax_int8_row(x, kernel):
    """A single row times a matrix of int8, in a form that XLA's CPU compiler makes vector instructions of.

    Otherwise it multiplies a single row number by number, or by way of a copy of the matrix in another order. Sums of a
    few rows of the matrix, written out term by term, are a loop over its columns instead, which reads about 2.5 times
    the numbers a second that a float32 product reads. The rows of a sum are far apart, so that memory is read
    in as many streams: up to twice as fast as rows that follow one another.

    Returns:
        int32, exact: the sums are float32, but one of up to `EXACT_PRODUCTS` stays below 2^24.
    """
    import jax.numpy as jnp

    x, kernel = _barrier(x, kernel)
    x, out = x.astype("float32").reshape(ROWS, -1, 1), (*x.shape[:-1], kernel.shape[1])
    kernel = kernel.reshape(ROWS, -1, kernel.shape[1])
    partial = _accumulate([x[i] * kernel[i].astype("float32") for i in range(ROWS)])
    least = -(-len(partial) * ROWS // EXACT_PRODUCTS)
    parts = next(n for n in range(least, len(partial) + 1) if len(partial) % n == 0)
    partial = partial.reshape(parts, -1, partial.shape[1])
    # A product and not a sum, which XLA would run number by number.
    sums = jnp.einsum("pk,pkn->pn", jnp.ones(partial.shape[:2]), partial)
    return jnp.sum(sums.astype("int32"), axis=0).reshape(out)


def _jax_transposed_int8_row(x, kernel):
    """As `_jax_row` for int8 [out, in], along the rows: about 4.5 times the numbers of a float32 product."""
    import jax.numpy as jnp

    x, kernel = _barrier(x, kernel)
    row = x.astype("float32").reshape(-1)
    parts = [slice(start, start + LANES) for start in range(0, x.size, LANES)]
    partial = _accumulate([row[part] * kernel[:, part].astype("float32") for part in parts])
    return jnp.sum(partial.astype("int32"), axis=1).reshape(*x.shape[:-1], -1)


def _barrier(x, kernel):
    """Both, so that XLA cannot see that in a loop over x the kernel stays.

    It would widen the kernel before the loop, once for all steps: float32 copies of all weights, which each step reads.
    """
    import jax

    return jax.lax.optimization_barrier((x, kernel))


def _accumulate(terms):
    import jax

    # The barrier keeps the loop apart from the sum over its results.
    return jax.lax.optimization_barrier(sum(terms[1:], terms[0]))


def _takes_gradients():
    import torch

    return torch.is_grad_enabled()


def _has_onednn(*tensors):
    import torch

    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _suits_mkl(x):
    return x.numel() == x.shape[-1] and _is_intel()


@functools.cache
def _is_intel():
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" in platform.processor()


def _is_jax_cpu():
    import jax

    return jax.default_backend() == "cpu"


@functools.cache
def _has_tensorflow_gpu():
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def _jax_matmul(x, kernel, transposed, dtype, least_rows=1):
    import jax

    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count < least_rows:
        # The barrier keeps XLA from seeing that the two rows are one.
        rows = jax.lax.optimization_barrier(jax.numpy.concatenate([rows, rows]))
    if transposed and rows.dtype != "int8" and 1 < len(rows) <= MOST_FEW_ROWS and _is_jax_cpu():
        # The barrier keeps XLA from turning it round again.
        product = jax.lax.dot_general(
            kernel, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )
        product = jax.lax.optimization_barrier(product).T[:count]
    else:
        axes = (((1,), (1 if transposed else 0,)), ((), ()))
        product = jax.lax.dot_general(rows, kernel, axes, preferred_element_type=dtype)[:count]
    return product.reshape(*x.shape[:-1], product.shape[1])
