"""Products with a matrix of weights, by the fastest routine of each backend."""

import keras

from keras_vaultgemma.backend.choice import NAME


def matmul(x, kernel, transposed=False):
    """`x` [..., in] times `kernel` [in, out], in their dtype, by the fastest routine of this backend for few rows.

    On PyTorch's CPU this is oneDNN where no gradient is asked for: it reads 35 to 45 GB/s of float32 weights where MKL,
    which `torch.matmul` calls, reads 18 to 27 (2 AMD cores), in either layout. On JAX's CPU, 16-bit products are asked
    for in float32 and for two rows or more: only so does XLA multiply 16-bit weights without a float32 copy of them.

    Args:
        transposed: whether `kernel` is [out, in] instead.
    """
    if NAME == "torch" and _has_onednn(x, kernel):
        import torch

        rows, weight = x.reshape(-1, x.shape[-1]), kernel if transposed else kernel.t()
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
        return product.reshape(*x.shape[:-1], weight.shape[0])
    if NAME == "jax" and x.dtype.itemsize == 2 and _is_jax_cpu():
        return _jax_product(x, kernel, transposed, "float32", least_rows=2).astype(x.dtype)
    if NAME == "jax" and transposed:
        # XLA would copy a transposed operand.
        return _jax_product(x, kernel, transposed, x.dtype)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def int8_matmul(x, kernel, transposed=False):
    """`matmul` of int8 and int8 to int32; has no gradient."""
    if NAME == "torch" and kernel.device.type == "cpu":
        import torch

        kernel = kernel.t() if transposed else kernel
        return torch._int_mm(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])
    if NAME == "jax" and _is_jax_cpu():
        return _jax_product(x, kernel, transposed, "int32", least_rows=2)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def _has_onednn(*tensors):
    import torch

    return (
        not torch.is_grad_enabled()
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_jax_cpu():
    import jax

    return jax.default_backend() == "cpu"


def _jax_product(x, kernel, transposed, dtype, least_rows=1):
    import jax

    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count < least_rows:
        # The barrier keeps XLA from seeing that the two rows are one.
        rows = jax.lax.optimization_barrier(jax.numpy.concatenate([rows, rows]))
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    product = jax.lax.dot_general(rows, kernel, axes, preferred_element_type=dtype)
    return product[:count].reshape(*x.shape[:-1], product.shape[1])
