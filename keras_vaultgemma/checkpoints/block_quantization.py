"""Weights in blocks of 4-bit integers with a scale, as ONNX Runtime's `MatMulNBits` reads them."""

import numpy as np

BLOCK = 32
"""Values of one block. WebGPU's kernels are fastest with 32."""

BITS, MIDDLE = 4, 8
"""Bits of an integer, and the integer that stands for 0."""


def quantize_blocks(matrix):
    """Round a matrix so that `(integers - MIDDLE) * scales` is next to it.

    Args:
        matrix: float32 array [R, C], C a multiple of `BLOCK`.

    Returns:
        Tuple of uint8 `[R, C / BLOCK, BLOCK / 2]`, the first of two integers in the low half of a
        byte, and float32 scales `[R, C / BLOCK]`.

    Example:

    ```python
    import numpy as np
    from keras_vaultgemma.checkpoints.block_quantization import quantize_blocks

    packed, scales = quantize_blocks(np.linspace(-1, 1, 64, dtype="float32").reshape(1, 64))
    ```
    """
    blocks = matrix.reshape(len(matrix), -1, BLOCK)
    # The scale has the sign by which the largest value becomes the integer 0, because there is one
    # integer more below the middle than above it.
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = largest / np.float32(-MIDDLE)
    scales[scales == 0] = 1
    integers = np.clip(np.round(blocks / scales) + MIDDLE, 0, 2**BITS - 1).astype("u1")
    return integers[..., ::2] | integers[..., 1::2] << BITS, scales[..., 0]
