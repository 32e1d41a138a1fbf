"""Models of VaultGemma 1B's size with random weights, and the memory of a process."""

import ctypes
import gc
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from keras_vaultgemma.checkpoints import weight_map

HEADS = dict(num_query_heads=4, num_key_value_heads=4, head_dim=256)
SIZES = {
    "1b": dict(
        vocabulary_size=256_000, num_layers=26, hidden_dim=1152, intermediate_dim=6912, **HEADS
    ),
    "tiny": dict(vocabulary_size=1000, num_layers=2, hidden_dim=64, intermediate_dim=128, **HEADS),
}


class Tiled:
    """A repeated block of random numbers, because drawing a billion takes too long."""

    # The length is prime, so that the rows of a matrix differ. The numbers are those of bfloat16,
    # so that models of all dtypes have the same weights.
    block = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype(ml_dtypes.bfloat16)

    def __init__(self, shape):
        self.shape = shape

    def read(self, dtype):
        return np.resize(self.block.astype(dtype), self.shape)


def vaultgemma(size, dtype):
    """Build a `VaultGemmaCausalLM` without preprocessor; "int8" is quantized from float32."""
    from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM

    values = {weight.path: Tiled(weight.shape) for weight in weight_map.weight_map(size)}
    floats = "float32" if dtype == "int8" else dtype
    model = VaultGemmaCausalLM(VaultGemmaBackbone(**size, initial_values=values, dtype=floats))
    if dtype == "int8":
        model.quantize("int8")
    return model


def keras_hub_gemma(size, dtype):
    """Build keras-hub's `GemmaBackbone` of the same shapes."""
    from keras_hub.models import GemmaBackbone

    # It counts both branches of the gated MLP together.
    return GemmaBackbone(**size | {"intermediate_dim": 2 * size["intermediate_dim"]}, dtype=dtype)


def parameters(size):
    """Return the number of parameters."""
    return sum(weight.size for weight in weight_map.weight_map(size))


def resident(field):
    """Return the bytes of "VmRSS" (resident) or "VmHWM" (its peak since `reset_peak`), on Linux."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def reset_peak():
    """Return free memory to the system, reset "VmHWM" and return "VmRSS"."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")
