"""Seeds of the noise, one for each step and variable, and of random layers; none twice.

`keras.random` is not used: its seeds have 30 bits by default, and on PyTorch two of its streams meet. A generator
should take all 128 bits: of 64-bit seeds for 100,000 steps of 200 variables, two are equal with probability 1e-5.

Not covered: the generators of the backends are statistical, not cryptographic, and their normal deviates are float32
numbers, of which a gap in the last bits may tell something (Mironov, 2012, doi:10.1145/2382196.2382264). Both need an
attacker who sees noised sums to the last bit, which an optimizer's float32 update of the weights rounds away.
"""

import hashlib
import hmac
import os
import warnings

import numpy as np


def noise_seed(secret, step, variable):
    """The seed of one variable's noise in one step.

    Args:
        secret: 16 bytes, as `secret_key.new` returns them; of one call of `fit`, in which no step comes twice.
        step: int, 0 or more.
        variable: int, 0 or more: place of the variable among the trainable ones.

    Returns:
        uint32 [4]: 128 bits.
    """
    return np.frombuffer(derive(secret, "noise", step, variable)[:16], "<u4").astype("uint32")


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
    return (np.frombuffer(derive(secret, "layers", step, layer)[:8], "<u4") >> 1).astype("int32")


# MERGED: """The secret that a private run's random numbers come from. Whoever knows the secret knows which rows a step drew and can subtract its noise: all of the guarantee rests on it. It is 128 bits from the operating system, it lives in the memory of one process, and it is never written anywhere. One call of `fit` draws one secret and uses each of its steps once; a resume, a second `fit` and a restart draw new ones. Two secrets are equal with probability 2^-128, so that nothing is ever used twice, whatever step a restart counts on from; had the secret been saved for that, anybody with the checkpoint could undo the noise. Bits for one purpose are derived with HMAC-SHA256 (RFC 2104), a pseudorandom function: to tell its outputs from independent random bits takes about 2^128 trials, which the guarantee, like any that is made by a computer, assumes nobody has. """
SIZE = 16
"""Bytes of a secret."""


class NotPrivateWarning(UserWarning):
    """What is trained in this way has no privacy guarantee."""


def new_secret():
    """A secret: 16 bytes from the operating system."""
    return os.urandom(SIZE)


def fixed_secret(seed):
    """A secret that anybody can compute, for tests that repeat a run: it is not private, and a warning says so.

    Args:
        seed: int from 0 to 2^64 - 1.
    """
    warnings.warn(
        f"A fixed seed ({seed}) makes this run repeatable and NOT private: whoever knows the seed can remove the "
        "noise. Leave it out for anything but a test.",
        NotPrivateWarning,
        stacklevel=2,
    )
    return derive(bytes(SIZE), "fixed seed", seed)[:SIZE]


def derive(secret, purpose, *numbers):
    """32 bytes for one purpose, as if drawn anew for each purpose and each list of numbers.

    Args:
        secret: 16 bytes.
        purpose: str without NUL.
        numbers: ints from 0 to 2^64 - 1, as many for each use of a purpose.

    Raises:
        ValueError: for a secret of another length or a number out of range.
    """
    if len(secret) != SIZE:
        raise ValueError(f"`secret` must have {SIZE} bytes. Received: {len(secret)} bytes")
    for number in numbers:
        if not 0 <= number < 2**64:
            raise ValueError(
                f"Numbers to derive from must be from 0 to 2^64 - 1. Received: {number}"
            )
    # Ends the purpose, and all numbers are of one length: no two lists give the same message.
    message = (
        purpose.encode() + b"\0" + b"".join(int(number).to_bytes(8, "big") for number in numbers)
    )
    return hmac.digest(secret, message, hashlib.sha256)
