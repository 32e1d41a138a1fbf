"""The secret of a private run, and the seeds of noise and random layers that are derived from it.

**The secret.** Anyone who knows the secret knows which records a step drew and can subtract its
noise: the whole guarantee rests on it. It has 128 bits from the operating system, lives in the
memory of one process, or of those that train together (`processes`), and is never written anywhere.
One call of `fit` draws one secret and uses each of its steps once; resuming, a second `fit` and a
restart draw new ones. Two secrets are equal with probability 2^-128, so no noise is ever used
twice, whatever step number a restart continues from. If the secret were saved to repeat a run,
anyone with the checkpoint could remove the noise.

**Derivation.** Bits for one purpose are derived with HMAC-SHA256, a pseudorandom function.
Distinguishing its outputs from independent random bits takes about 2^128 trials; like every
guarantee of an implementation on a computer, this one assumes that nobody can afford them.

**Seeds.** Every step and variable has a noise seed of its own. `keras.random` is not used, because
its default seeds have 30 bits and two of its streams coincide on PyTorch. A generator should take
all 128 bits: of 64-bit seeds for 100,000 steps of 200 variables, two are equal with probability
1e-5.

**Not covered.** The generators that turn seeds into noise (`privacy/noise.py`) are statistical and
not cryptographic, unless `DPSGD(secure=True)` is asked for.

References:
    - [RFC 2104](https://www.rfc-editor.org/rfc/rfc2104): HMAC
"""

import hashlib
import hmac
import os
import warnings

import numpy as np

SECRET_SIZE = 16
"""Bytes of a secret."""


class NotPrivateWarning(UserWarning):
    """Warning that training with `DPSGD(seed_for_tests=...)` has no privacy guarantee.

    Example:

    ```python
    import warnings
    from keras_vaultgemma import privacy

    # Fail instead of training without privacy if a test's seed was left in.
    warnings.filterwarnings("error", category=privacy.NotPrivateWarning)
    ```
    """


def new_secret() -> bytes:
    """Return a new secret: 16 bytes from the operating system."""
    return os.urandom(SECRET_SIZE)


def fixed_secret(seed: int) -> bytes:
    """Return a secret that anyone can compute, for tests that repeat a run, and warn about it.

    Args:
        seed: int from 0 to 2^64 - 1.

    Returns:
        bytes of length 16.
    """
    warnings.warn(
        f"A fixed seed ({seed}) makes this run repeatable and NOT private: anyone who knows the "
        "seed can remove the noise. Use it in tests only.",
        NotPrivateWarning,
        stacklevel=2,
    )
    return derive(bytes(SECRET_SIZE), "fixed seed", seed)[:SECRET_SIZE]


def noise_seed(secret: bytes, step: int, variable: int) -> np.ndarray:
    """Return the seed of one variable's noise in one step.

    Args:
        secret: bytes of length 16. Secret of one call of `fit`, in which no step is used twice.
        step: int, 0 or more.
        variable: int, 0 or more. Index of the variable among the trainable ones.

    Returns:
        uint32 array of shape `[4]`: 128 bits.
    """
    return np.frombuffer(derive(secret, "noise", step, variable)[:16], "<u4").astype("uint32")


def layer_seed(secret: bytes, step: int, layer: int, device: int = 0) -> np.ndarray:
    """Return the seed of a random layer, such as dropout, in one step.

    It is derived from the secret and not stored in a variable. A stored seed that every microbatch
    advances would reveal how many rows were drawn, and a known seed which rows were computed with
    which part of the weights.

    Args:
        secret: bytes of length 16. Secret of one call of `fit`, in which no step is used twice.
        step: int, 0 or more.
        layer: int, 0 or more. Index of the random layer.
        device: int, 0 or more. Index of the device that computes rows with it. Defaults to 0.

    Returns:
        int32 array of shape `[2]`, not negative: 62 bits, because Keras's seeds are two numbers.
    """
    numbers = (step, layer, device) if device else (step, layer)
    return (np.frombuffer(derive(secret, "layers", *numbers)[:8], "<u4") >> 1).astype("int32")


def derive(secret: bytes, purpose: str, *numbers: int) -> bytes:
    """Return 32 bytes that are pseudorandom and independent for each purpose and list of numbers.

    Args:
        secret: bytes of length 16.
        purpose: str without NUL characters.
        *numbers: ints from 0 to 2^64 - 1.

    Returns:
        bytes of length 32.

    Raises:
        ValueError: If the secret has another length or a number is out of range.
    """
    if len(secret) != SECRET_SIZE:
        raise ValueError(f"`secret` must have {SECRET_SIZE} bytes. Received: {len(secret)} bytes")
    for number in numbers:
        if not 0 <= number < 2**64:
            raise ValueError(f"`numbers` must be from 0 to 2^64 - 1. Received: {number}")
    # Unambiguous, because NUL ends the purpose and every number has the same length.
    message = (
        purpose.encode() + b"\0" + b"".join(int(number).to_bytes(8, "big") for number in numbers)
    )
    return hmac.digest(secret, message, hashlib.sha256)
