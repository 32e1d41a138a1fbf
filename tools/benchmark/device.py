"""The device that the Keras backend computes on: what it is, its memory and its precision.

Scripts of transformers, PEFT and Opacus run with the backend "torch".
"""

import contextlib
import os

import random_model


def name():
    """Return the name of the GPU, or None on a CPU."""
    backend = os.environ["KERAS_BACKEND"]
    if backend == "torch":
        import torch

        return torch.cuda.get_device_name() if _torch_device() == "cuda" else None
    if backend == "jax":
        import jax

        return None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    details = tf.config.experimental.get_device_details(found[0]) if found else {}
    return details.get("device_name", "GPU") if found else None


def torch_device():
    """Return the device of PyTorch, as Keras chooses it."""
    import torch

    return torch.device(_torch_device())


def _torch_device():
    import torch

    default = "cuda" if torch.cuda.is_available() else "cpu"
    return os.environ.get("KERAS_TORCH_DEVICE", default).split(":")[0]


def synchronize():
    """Wait until PyTorch's device has finished its work."""
    import torch

    if _torch_device() == "cuda":
        torch.cuda.synchronize()


def reset_peak():
    """Return the bytes of memory in use, and count the peak from here.

    JAX counts it from the start of the process. A model is built without a larger one.
    """
    if name() is None:
        return random_model.reset_peak()
    backend = os.environ["KERAS_BACKEND"]
    if backend == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if backend == "jax":
        return _jax_memory()["bytes_in_use"]
    import tensorflow as tf

    tf.config.experimental.reset_memory_stats("GPU:0")
    return tf.config.experimental.get_memory_info("GPU:0")["current"]


def peak():
    """Return the largest number of bytes in use since `reset_peak`."""
    if name() is None:
        return random_model.resident("VmHWM")
    backend = os.environ["KERAS_BACKEND"]
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    if backend == "jax":
        return _jax_memory()["peak_bytes_in_use"]
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def _jax_memory():
    import jax

    return jax.local_devices()[0].memory_stats()


@contextlib.contextmanager
def full_precision():
    """Multiply float32 matrices in float32, where JAX and TensorFlow may take TF32 on a GPU."""
    backend = os.environ["KERAS_BACKEND"]
    if backend == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            yield
    elif backend == "tensorflow":
        import tensorflow as tf

        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)
    else:
        import torch

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
