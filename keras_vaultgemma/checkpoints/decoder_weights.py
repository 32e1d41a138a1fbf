"""The weights of a decoder step, by their names in its graph, read block by block."""

from typing import Any

import numpy as np

from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.block_quantization import BITS, BLOCK, quantize_blocks
from keras_vaultgemma.checkpoints.decoder_graph import packed_names
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.checkpoints.onnx_weights import (
    INT8,
    OnnxWeight,
    checkpoint_weights,
    norm_weight,
)

Q8, Q4 = "q8", "q4"
"""transformers.js's names of int8 with a scale for each output, and of 4 bits with one for each
block."""

BYTES = {Q8: 1, Q4: BITS / 8 + 4 / BLOCK}
"""Bytes of a value, with its share of a scale of a block."""


def check_blocks(hyperparameters, dtype):
    """Raise ValueError for the first matrix whose rows are no whole number of blocks."""
    if dtype != Q4:
        return
    for weight in weight_map.weight_map(hyperparameters):
        if len(weight.shape) > 1 and weight.shape[-1] % BLOCK:
            raise ValueError(
                f"dtype={dtype!r} rounds blocks of {BLOCK} values, so that the rows of "
                f"{weight.path} must be a multiple of {BLOCK}. "
                f"Received: rows of {weight.shape[-1]}"
            )


def decoder_weights(hyperparameters, values, dtype):
    """Return the weights of a checkpoint and the shapes of those in blocks.

    Args:
        hyperparameters: dict. Constructor arguments of the backbone.
        values: dict of the variables' paths to `LazyTensor`.
        dtype: string. Dtype of the matrices: "float32", "float16", `Q8` or `Q4`.

    Returns:
        Tuple of a dict of names to `OnnxWeight`, and a dict of the names of matrices in blocks of
        4 bits to their shapes [out, in].
    """
    if dtype != Q4:
        return checkpoint_weights(hyperparameters, values, INT8 if dtype == Q8 else dtype), {}
    weights: dict[str, Any] = {}
    packed = {}
    for weight in weight_map.weight_map(hyperparameters):
        value = values[weight.path]
        if len(weight.shape) == 1:
            weights[weight.path] = norm_weight(value.read("float32"))
        else:
            location = weight.locations[weight_map.HUGGING_FACE]
            parts = _InBlocks(value, location).parts()
            weights |= zip(packed_names(weight.path), parts, strict=True)
            packed[weight.path] = weight.shape
    return weights, packed


class _InBlocks:
    """A matrix [out, in] of a checkpoint, which is quantized while it is read."""

    def __init__(self, value, location):
        self._value, self._location = value, location
        self._scales = []

    def parts(self):
        """Return an `OnnxWeight` each of integers and scales, to be read in this order."""
        rows, columns = self._location.shape
        count = columns // BLOCK
        return (
            OnnxWeight((rows, count, BLOCK * BITS // 8), np.dtype("u1"), self._integers),
            OnnxWeight((rows, count), np.dtype("<f4"), lambda: iter(self._scales)),
        )

    def _integers(self):
        self._scales.clear()
        for block in self._value.blocks(self._location, DTYPES["float32"]):
            integers, scales = quantize_blocks(block)
            self._scales.append(scales)
            yield integers
