import keras
import numpy as np
from common import random_backbone, to_numpy

from keras_vaultgemma.layers.rotary import RotaryAngles


def test_block_without_attention_and_mlp_is_the_identity():
    """Both branches are added to the residual, and nothing else touches it: VaultGemma has no post-norms."""
    block = random_backbone(num_layers=1).transformer_layers[0]
    block.attention.attention_output.weight.assign(np.zeros((48, 64)))
    block.down.weight.assign(np.zeros((48, 96)))
    x = np.random.default_rng(0).normal(size=(1, 2, 48)).astype("float32")
    mask = np.ones((1, 2, 2), bool)
    angles = RotaryAngles(16, 1e4)(np.array([[0, 1]], "int32"))
    out = block(
        keras.ops.convert_to_tensor(x),
        angles=angles,
        attention_mask=keras.ops.convert_to_tensor(mask),
    )
    np.testing.assert_array_equal(to_numpy(out), x)
