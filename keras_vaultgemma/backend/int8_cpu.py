"""Matmuls of int8 numbers, with kernels for CPUs."""

import keras

from keras_vaultgemma.backend.matmul import is_jax_cpu, jax_barrier, jax_matmul
from keras_vaultgemma.backend.selection import NAME

ROW_TERMS, COLUMN_TERMS = 16, 32
"""Terms of one loop on JAX's CPU: rows of a matrix [in, out], columns of one [out, in]."""

MAX_EXACT_TERMS = 2**24 // 128**2
"""Number of products of two int8 numbers whose sum is exact in float32, in any order."""

MAX_ROW_LENGTH = 2**13
"""Length of a row up to which its loop is unrolled, because each term takes time to compile."""


def int8_matmul(x, kernel, transposed=False):
    """Return the int32 matmul of int8 tensors. It has no gradient.

    Args:
        x: int8 tensor [..., in].
        kernel: int8 tensor [in, out].
        transposed: bool. True if `kernel` is [out, in] instead. Defaults to False.

    Returns:
        int32 tensor [..., out]. It is exact, except that Keras adds in float32 on PyTorch's GPU,
        where sums above 2^24 are rounded.
    """
    if NAME == "torch" and kernel.device.type == "cpu":
        import torch

        kernel = kernel.t() if transposed else kernel
        product = torch._int_mm(x.reshape(-1, x.shape[-1]), kernel)
        return product.reshape(*x.shape[:-1], kernel.shape[1])
    if NAME == "jax" and is_jax_cpu():
        if _is_short_row(x, COLUMN_TERMS if transposed else ROW_TERMS):
            return _multiply_row_transposed(x, kernel) if transposed else _multiply_row(x, kernel)
        return jax_matmul(x, kernel, transposed, "int32", min_rows=2)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def _is_short_row(x, divisor):
    size = x.shape[-1]
    return x.size == size and size % divisor == 0 and size <= MAX_ROW_LENGTH


def _multiply_row(x, kernel):
    """Return a single row times a matrix [in, out], in a form that XLA's CPU compiler vectorises.

    XLA would otherwise multiply a single row number by number, or by way of a transposed copy of
    the matrix. Sums of a few rows of the matrix, written out term by term, are vectorised over
    columns: about 2.5 times the numbers a second of a float32 matmul. The rows of a sum are far
    apart, so that memory is read in as many streams, which is up to twice as fast as consecutive
    rows.

    The result is exact: sums are float32, and each has at most `MAX_EXACT_TERMS` terms.
    """
    import jax.numpy as jnp

    x, kernel = jax_barrier(x, kernel)
    x, out_shape = x.astype("float32").reshape(ROW_TERMS, -1, 1), (*x.shape[:-1], kernel.shape[1])
    kernel = kernel.reshape(ROW_TERMS, -1, kernel.shape[1])
    sums = _add([x[i] * kernel[i].astype("float32") for i in range(ROW_TERMS)])
    min_parts = -(-len(sums) * ROW_TERMS // MAX_EXACT_TERMS)
    parts = next(n for n in range(min_parts, len(sums) + 1) if len(sums) % n == 0)
    sums = sums.reshape(parts, -1, sums.shape[1])
    # A matmul with ones, because XLA does not vectorise the sum over the first axis.
    sums = jnp.einsum("pk,pkn->pn", jnp.ones(sums.shape[:2]), sums)
    return jnp.sum(sums.astype("int32"), axis=0).reshape(out_shape)


def _multiply_row_transposed(x, kernel):
    """Return a single row times a matrix [out, in]: 4.5 times the numbers of a float32 matmul."""
    import jax.numpy as jnp

    x, kernel = jax_barrier(x, kernel)
    row = x.astype("float32").reshape(-1)
    parts = [slice(start, start + COLUMN_TERMS) for start in range(0, x.size, COLUMN_TERMS)]
    sums = _add([row[part] * kernel[:, part].astype("float32") for part in parts])
    return jnp.sum(sums.astype("int32"), axis=1).reshape(*x.shape[:-1], -1)


def _add(terms):
    import jax

    # The barrier keeps XLA from fusing this loop with the sum over its results.
    return jax.lax.optimization_barrier(sum(terms[1:], terms[0]))
