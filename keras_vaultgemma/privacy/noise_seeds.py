"""Seeds of the noise, one for each step and variable, and of random layers; none twice.

`keras.random` is not used: its seeds have 30 bits by default, and on PyTorch two of its streams meet. A generator
should take all 128 bits: of 64-bit seeds for 100,000 steps of 200 variables, two are equal with probability 1e-5.

Not covered: the generators of the backends are statistical, not cryptographic, and their normal deviates are float32
numbers, of which a gap in the last bits may tell something (Mironov, 2012, doi:10.1145/2382196.2382264). Both need an
attacker who sees noised sums to the last bit, which an optimizer's float32 update of the weights rounds away.
"""

import numpy as np

from keras_vaultgemma.privacy import secret_key


def seed(secret, step, variable):
    """The seed of one variable's noise in one step.

    Args:
        secret: 16 bytes, as `secret_key.new` returns them; of one call of `fit`, in which no step comes twice.
        step: int, 0 or more.
        variable: int, 0 or more: place of the variable among the trainable ones.

    Returns:
        uint32 [4]: 128 bits.
    """
    return np.frombuffer(secret_key.derive(secret, "noise", step, variable)[:16], "<u4").astype("uint32")


def layer_seed(secret, step, layer):
    """The seed of what a random layer draws in one step, such as dropout.

    From the secret, too, and left in no variable: a saved seed that each microbatch has moved on would tell how many
    rows were drawn, and a known one which rows were computed with which part of the weights.

    Args:
        secret, step: as for `seed`.
        layer: int, 0 or more.

    Returns:
        int32 [2], not negative: of 62 bits, as Keras's own seeds are two numbers.
    """
    return (np.frombuffer(secret_key.derive(secret, "layers", step, layer)[:8], "<u4") >> 1).astype("int32")
