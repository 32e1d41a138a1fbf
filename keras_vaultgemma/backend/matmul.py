"""Matmuls with a matrix of weights, by the fastest routine of each backend."""

import functools
import platform
from pathlib import Path

import keras

from keras_vaultgemma.backend.autodiff import fused
from keras_vaultgemma.backend.selection import NAME

MAX_FEW_ROWS = 64
"""Rows of `x` up to which a CPU is faster with the matrix as the first operand."""

SMALL_MATRIX = 2**18
"""Elements of a matrix below which oneDNN's own overhead is what takes time (PyTorch).

8 rows times a matrix [192, 512] take 10 to 17 µs in MKL and 51 in oneDNN (Intel cores).
"""


def matmul(x, kernel, transposed=False):
    """Return the matmul of activations and weights, in their dtype.

    A matrix [out, in] is the faster one for few rows. On JAX's and TensorFlow's CPU it becomes the
    first operand, which reads 15 to 20 GB/s of float32 weights for 8 rows, where `x` first reads 8
    to 11 in either layout (2 Intel cores). A single row reads 25 to 28 GB/s of a matrix
    [1152, 6912], and 15 to 18 of its transpose.

    On PyTorch's CPU, oneDNN is called where no gradient is needed: it reads 35 to 45 GB/s of
    float32 weights where MKL, which `torch.matmul` calls, reads 18 to 27 (2 AMD cores), in either
    layout. On Intel, MKL is faster for a single row (25 to 27 GB/s instead of 19 to 22) and slower
    from 8 rows. It also gets matrices below `SMALL_MATRIX`.

    On JAX's CPU, 16-bit matmuls return float32 and have two rows or more, because only then does
    XLA multiply 16-bit weights without a float32 copy of them.

    Args:
        x: float tensor [..., in].
        kernel: float tensor [in, out]. Or [U, in, out], with a matrix for each B / U consecutive
            rows of `x` [B, T, in].
        transposed: bool. True if the matrices are [out, in] instead. Defaults to False.

    Returns:
        Tensor [..., out].
    """
    if len(kernel.shape) == 3:
        rows = keras.ops.reshape(x, (keras.ops.shape(kernel)[0], -1, x.shape[-1]))
        kernel = keras.ops.transpose(kernel, (0, 2, 1)) if transposed else kernel
        shape = (*keras.ops.shape(x)[:-1], kernel.shape[2])
        return keras.ops.reshape(keras.ops.matmul(rows, kernel), shape)
    if NAME == "torch" and x.dtype == kernel.dtype:
        return _torch_matmul(x, kernel, transposed)
    if NAME == "jax" and x.dtype.itemsize == 2 and is_jax_cpu():
        return jax_matmul(x, kernel, transposed, "float32", min_rows=2).astype(x.dtype)
    if NAME == "jax" and transposed:
        # XLA would copy a transposed operand.
        return jax_matmul(x, kernel, transposed, x.dtype)
    if NAME == "tensorflow" and transposed and x.dtype == kernel.dtype:
        return _tensorflow_matmul(x, kernel)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def thin_matmul(x, kernel, transposed=False):
    """Return `matmul` with a matrix to train that has few rows or columns, as LoRA's have.

    On JAX the gradient of the matrix is a product whose first operand is the thin one. JAX's own
    begins with `x`, and XLA's CPU compiler then transposes the wide operand together with all that
    computes it, in one thread: with LoRA of all projections (4 layers, 2048 tokens, rank 8) half of
    a training step.

    The arguments are those of `matmul`.
    """
    if NAME != "jax" or len(kernel.shape) == 3:
        return matmul(x, kernel, transposed)
    return _jax_thin_matmul()(x, kernel, transposed)


@functools.cache  # one function for all layers
def _jax_thin_matmul():
    import jax

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def product(x, kernel, transposed):
        return matmul(x, kernel, transposed)

    def forward_pass(x, kernel, transposed):
        return matmul(x, kernel, transposed), (x, kernel)

    def backward_pass(transposed, inputs, upstream):
        x, kernel = inputs
        rows, gradients = (a.reshape(-1, a.shape[-1]) for a in (x, upstream))
        is_x_thin = rows.shape[1] <= gradients.shape[1]
        operands = (rows, gradients) if is_x_thin else (gradients, rows)
        kernel_gradient = jax.lax.dot_general(*operands, (((0,), (0,)), ((), ())))
        if is_x_thin == transposed:
            kernel_gradient = kernel_gradient.T
        return matmul(upstream, kernel, not transposed), kernel_gradient

    product.defvjp(forward_pass, backward_pass)
    return product


def take_rows(table, ids):
    """Return rows of a table of embeddings.

    Args:
        table: tensor [V, D]. Or [U, V, D], with a table for each B / U consecutive rows of ids.
        ids: int tensor [...]. [B, T] with several tables.

    Returns:
        Tensor [..., D].
    """
    if len(table.shape) == 3:
        tables, size, width = table.shape
        first = keras.ops.arange(tables, dtype=ids.dtype)[:, None] * size
        ids_of_all = keras.ops.reshape(ids, (tables, -1)) + first
        rows = keras.ops.take(keras.ops.reshape(table, (-1, width)), ids_of_all, axis=0)
        return keras.ops.reshape(rows, (*ids.shape, width))
    if NAME == "jax" and table.dtype.itemsize == 2 and is_jax_cpu():
        ids, table = jax_barrier(ids, table)
    return keras.ops.take(table, ids, axis=0)


def jax_barrier(x, kernel):
    """Return both, hiding from XLA that the kernel is constant in a loop over `x`.

    XLA would otherwise convert a narrow kernel to float32 once, before the loop: a float32 copy of
    all weights, which every step then reads.
    """
    import jax

    return jax.lax.optimization_barrier((x, kernel))


def jax_matmul(x, kernel, transposed, dtype, min_rows=1):
    """Return the matmul in `dtype`, computed with `min_rows` rows or more.

    The other arguments are those of `matmul`.
    """
    import jax

    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    # A symbolic number of rows is taken for many.
    is_few = isinstance(count, int) and count <= MAX_FEW_ROWS
    if is_few and count < min_rows:
        # The barrier keeps XLA from seeing that the two rows are equal.
        rows = jax.lax.optimization_barrier(jax.numpy.concatenate([rows, rows]))
    if transposed and rows.dtype != "int8" and is_few and len(rows) > 1 and is_jax_cpu():
        axes = (((1,), (1,)), ((), ()))
        product = jax.lax.dot_general(kernel, rows, axes, preferred_element_type=dtype)
        # The barrier keeps XLA from swapping the operands.
        product = jax.lax.optimization_barrier(product).T[:count]
    else:
        axes = (((1,), (1 if transposed else 0,)), ((), ()))
        product = jax.lax.dot_general(rows, kernel, axes, preferred_element_type=dtype)
        product = product[:count] if is_few else product
    return product.reshape(*x.shape[:-1], product.shape[1])


def is_jax_cpu():
    """True if JAX computes on a CPU."""
    import jax

    return jax.default_backend() == "cpu"


def _torch_matmul(x, kernel, transposed):
    import torch

    if _suits_onednn(x, kernel):
        rows, weight = x.reshape(-1, x.shape[-1]), kernel if transposed else kernel.t()
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
        return product.reshape(*x.shape[:-1], weight.shape[0])
    # `keras.ops.matmul` would call the same after 20 µs of checks, 183 times a token.
    return torch.nn.functional.linear(x, kernel) if transposed else torch.matmul(x, kernel)


def _tensorflow_matmul(x, kernel):
    """Return `x` [..., in] times `kernel` [out, in]."""
    import tensorflow as tf

    rows = tf.reshape(x, (-1, kernel.shape[1]))
    count, (out, size) = rows.shape[0], kernel.shape
    if count and 1 < count <= MAX_FEW_ROWS and out % 2 == 0 and not _has_tensorflow_gpu():
        # In two halves: XLA would swap the operands of a single matmul, and without XLA two halves
        # are faster.
        halves = tf.reshape(kernel, (2, -1, size))
        product = tf.matmul(halves, tf.stack([rows, rows]), transpose_b=True)
        product = tf.transpose(product, (2, 0, 1))
    else:
        product = tf.matmul(rows, kernel, transpose_b=True)
    return tf.reshape(product, (*keras.ops.shape(x)[:-1], out))


@functools.cache
def _has_tensorflow_gpu():
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def _suits_onednn(x, kernel):
    """True if oneDNN has this matmul, without a gradient, and is faster than MKL (PyTorch)."""
    import torch

    if torch.is_grad_enabled() or (x.numel() == x.shape[-1] and _is_intel()):
        return False
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, kernel))
        and kernel.ndim == 2
        and kernel.numel() >= SMALL_MATRIX
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@functools.cache
def _is_intel():
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" in platform.processor()


def sum_of_squares(x):
    """Return the sums of squares along the last axis, in the full precision of the dtype.

    It is not a product of vectors, which accelerators may round to TF32 or bfloat16.
    """
    if NAME == "torch":
        import torch

        return torch.linalg.vector_norm(x, dim=-1).square_()  # does not materialise the squares
    if NAME == "tensorflow":
        if not _has_tensorflow_gpu():  # full precision, without materialising the squares
            return keras.ops.einsum("...i,...i->...", x, x)
        return fused(_sum_of_squares)(x)
    return _sum_of_squares(x)


def _sum_of_squares(x):
    return keras.ops.sum(keras.ops.square(x), axis=-1)
