"""Products with a matrix of weights, by the fastest routine of each backend."""

import functools
import platform
from pathlib import Path

import keras

from keras_vaultgemma.backend.choice import NAME
from keras_vaultgemma.backend.gradients import looked_up

ROWS, LANES = {"int8": 16, "bfloat16": 8}, 32
"""Rows of a matrix that JAX's CPU adds up in one go for a single row of `x`, and columns of a transposed one. With 16
rows of bfloat16, or 6, the loop is no longer made of vector instructions, and takes 5 to 20 times as long."""

EXACT_PRODUCTS = 2**24 // 128**2
"""Products of two int8 numbers whose sum is exact in float32, in any order."""

MOST_FEW_ROWS = 16
"""Rows of `x` up to which reading the matrix takes most of the time of a product."""

PART = 288
"""Rows of a narrow float32 matrix, at most, that XLA's CPU multiplies a part of a single row with at a time."""

LONGEST_ROW = 2**13
"""Numbers of such a row at most: a transposed matrix has a term for each `LANES` of them to compile."""


ATTENDS_IN_ONE = NAME == "torch"
"""Whether `keras.ops.dot_product_attention` is one operation, which keeps no scores and reads keys as they lie."""


def matmul(x, kernel, transposed=False):
    """`x` [..., in] times `kernel` [in, out], in their dtype, by the fastest routine of this backend for few rows.

    On PyTorch's CPU this is oneDNN where no gradient is asked for: it reads 35 to 45 GB/s of float32 weights where MKL,
    which `torch.matmul` calls, reads 18 to 27 (2 AMD cores), in either layout. On Intel's MKL is the faster one for a
    single row, 25 to 27 GB/s and not 19 to 22, and the slower one for 8 rows or more. On JAX's CPU, 16-bit products are
    asked for in float32, a single row's in a form of its own (`_jax_row`) and others for two rows or more: only so does
    XLA multiply 16-bit weights without a float32 copy of them. There and on TensorFlow's CPU a single float32 row is
    multiplied in parts where the matrix is narrow: 26 and 24 GB/s of [6912, 1152] instead of 17 and 16.

    Args:
        transposed: whether `kernel` is [out, in] instead.
    """
    if NAME == "torch" and not _takes_gradients() and _has_onednn(x, kernel) and not _suits_mkl(x):
        import torch

        rows, weight = x.reshape(-1, x.shape[-1]), kernel if transposed else kernel.t()
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
        return product.reshape(*x.shape[:-1], weight.shape[0])
    if NAME == "jax" and x.dtype.itemsize == 2 and _is_jax_cpu():
        if kernel.dtype == "bfloat16" and not transposed and _is_short_row(x, ROWS["bfloat16"]):
            return _jax_row(x, kernel).astype(x.dtype)
        return _jax_product(x, kernel, transposed, "float32", least_rows=2).astype(x.dtype)
    if not transposed and x.dtype == "float32" and _is_xla_cpu() and (parts := _parts(x, kernel)) > 1:
        return _row_in_parts(x, kernel, parts)
    if NAME == "jax" and transposed:
        # XLA would copy a transposed operand.
        return _jax_product(x, kernel, transposed, x.dtype)
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
        return jnp.matmul(upstream, jnp.swapaxes(kernel, -1, -2)), jnp.matmul(jnp.swapaxes(rows, -1, -2), of_rows)

    product.defvjp(lambda *values: (product(*values), values), gradients)
    return product


def take_rows(table, ids):
    """Rows `ids` [...] of `table` [V, D]: [..., D]."""
    if NAME == "jax" and table.dtype.itemsize == 2 and _is_jax_cpu():
        # Else XLA would, before a loop over ids, make a float32 copy of the table, as it widens 16-bit numbers to move.
        ids, table = _kept_together(ids, table)
    return looked_up(table, ids) if NAME == "tensorflow" else keras.ops.take(table, ids, axis=0)


def arrange(kernel):
    """Lay the Keras variable `kernel` [in, out] out in memory as `matmul` reads it fastest; its values stay.

    On PyTorch's CPU that is column by column: oneDNN then reads float32 1.3 to 1.5 times as fast as row by row.
    Elsewhere nothing is done.
    """
    if NAME == "torch" and _has_onednn(kernel.value) and not kernel.value.t().is_contiguous():
        kernel.value.data = kernel.value.data.t().contiguous().t()


def int8_matmul(x, kernel, transposed=False):
    """`matmul` of int8 and int8 to int32; has no gradient."""
    if NAME == "torch" and kernel.device.type == "cpu":
        import torch

        kernel = kernel.t() if transposed else kernel
        return torch._int_mm(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])
    if NAME == "jax" and _is_jax_cpu():
        if _is_short_row(x, LANES if transposed else ROWS["int8"]):
            return _jax_transposed_int8_row(x, kernel) if transposed else _jax_row(x, kernel)
        return _jax_product(x, kernel, transposed, "int32", least_rows=2)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def _is_short_row(x, divisor):
    size = x.shape[-1]
    return x.size == size and size % divisor == 0 and size <= LONGEST_ROW


def _parts(x, kernel):
    """How many parts to multiply a single row in: 1 where it is no single row, or the matrix is wide or small."""
    if len(kernel.shape) > 2:  # a matrix for each row of a batch
        return 1
    size, width = kernel.shape
    if tuple(x.shape) != (*[1] * (len(x.shape) - 1), size) or width > 2 * size or size < 2 * PART:
        return 1
    least = -(-size // PART)
    parts = _divisor(size, least)
    return parts if parts < 2 * least else 1


def _divisor(number, at_least):
    return next(n for n in range(at_least, number + 1) if number % n == 0)


def _row_in_parts(x, kernel, parts):
    rows, kernels = keras.ops.reshape(x, (parts, -1)), keras.ops.reshape(kernel, (parts, -1, kernel.shape[1]))
    products = keras.ops.einsum("pk,pkn->pn", rows, kernels)
    return keras.ops.reshape(keras.ops.sum(products, axis=0), (*x.shape[:-1], -1))


def _jax_row(x, kernel):
    """A single row times a matrix of narrow numbers, in a form that XLA's CPU compiler makes vector instructions of.

    Otherwise it multiplies a single row number by number, or by way of a copy of the matrix in another order. Sums of a
    few rows of the matrix, written out term by term, are a loop over its columns instead, which reads about 2.5 times
    the numbers a second that a float32 product reads. The rows of a sum are far apart, so that memory is read
    in as many streams: up to twice as fast as rows that follow one another.

    Returns:
        int32 for int8, exact: the sums are float32, but one of up to `EXACT_PRODUCTS` stays below 2^24. Else float32.
    """
    import jax.numpy as jnp

    x, kernel = _kept_together(x, kernel)
    rows = ROWS[kernel.dtype.name]
    x, out = x.astype("float32").reshape(rows, -1, 1), (*x.shape[:-1], kernel.shape[1])
    is_int8 = kernel.dtype == "int8"
    # Widened before it is cut: 16-bit slices would be widened, narrowed and widened again.
    kernel = kernel if is_int8 else kernel.astype("float32")
    kernel = kernel.reshape(rows, -1, kernel.shape[1])
    partial = _added_up([x[i] * kernel[i].astype("float32") for i in range(rows)])
    # Products and not sums, which XLA would run number by number.
    if not is_int8:
        return jnp.matmul(jnp.ones((1, len(partial))), partial).reshape(out)
    parts = _divisor(len(partial), at_least=-(-len(partial) * rows // EXACT_PRODUCTS))
    partial = partial.reshape(parts, -1, partial.shape[1])
    sums = jnp.einsum("pk,pkn->pn", jnp.ones(partial.shape[:2]), partial)
    return jnp.sum(sums.astype("int32"), axis=0).reshape(out)


def _jax_transposed_int8_row(x, kernel):
    """As `_jax_row` for int8 [out, in], along the rows: about 4.5 times the numbers of a float32 product."""
    import jax.numpy as jnp

    x, kernel = _kept_together(x, kernel)
    row = x.astype("float32").reshape(-1)
    parts = [slice(start, start + LANES) for start in range(0, x.size, LANES)]
    partial = _added_up([row[part] * kernel[:, part].astype("float32") for part in parts])
    return jnp.sum(partial.astype("int32"), axis=1).reshape(*x.shape[:-1], -1)


def _kept_together(x, kernel):
    """Both, so that XLA cannot see that in a loop over x the kernel stays.

    It would widen the kernel before the loop, once for all steps: float32 copies of all weights, which each step reads.
    """
    import jax

    return jax.lax.optimization_barrier((x, kernel))


def _added_up(terms):
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


def _is_xla_cpu():
    if NAME != "tensorflow":
        return NAME == "jax" and _is_jax_cpu()
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def _jax_product(x, kernel, transposed, dtype, least_rows=1):
    import jax

    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count < least_rows:
        # The barrier keeps XLA from seeing that the two rows are one.
        rows = jax.lax.optimization_barrier(jax.numpy.concatenate([rows, rows]))
    if transposed and rows.dtype != "int8" and 1 < len(rows) <= MOST_FEW_ROWS:
        # The large matrix first: twice the speed on a CPU. Another barrier keeps XLA from turning it round again.
        product = jax.lax.dot_general(kernel, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        product = jax.lax.optimization_barrier(product).T[:count]
    else:
        axes = (((1,), (1 if transposed else 0,)), ((), ()))
        product = jax.lax.dot_general(rows, kernel, axes, preferred_element_type=dtype)[:count]
    return product.reshape(*x.shape[:-1], product.shape[1])
