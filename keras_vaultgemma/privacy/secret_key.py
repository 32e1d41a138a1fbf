"""The secret that a private run's random numbers come from.

Whoever knows the secret knows which rows a step drew and can subtract its noise: all of the guarantee rests on it. It
is 128 bits from the operating system, it lives in the memory of one process, and it is never written anywhere. One call
of `fit` draws one secret and uses each of its steps once; a resume, a second `fit` and a restart draw new ones. Two
secrets are equal with probability 2^-128, so that nothing is ever used twice, whatever step a restart counts on from;
had the secret been saved for that, anybody with the checkpoint could undo the noise.

Bits for one purpose are derived with HMAC-SHA256 (RFC 2104), a pseudorandom function: to tell its outputs from
independent random bits takes about 2^128 trials, which the guarantee, like any that is made by a computer, assumes
nobody has.
"""

import hashlib
import hmac
import os
import warnings

SIZE = 16
"""Bytes of a secret."""


class NotPrivateWarning(UserWarning):
    """What is trained in this way has no privacy guarantee."""


def new():
    """A secret: 16 bytes from the operating system."""
    return os.urandom(SIZE)


def fixed(seed):
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
            raise ValueError(f"Numbers to derive from must be from 0 to 2^64 - 1. Received: {number}")
    # Ends the purpose, and all numbers are of one length: no two lists give the same message.
    message = purpose.encode() + b"\0" + b"".join(int(number).to_bytes(8, "big") for number in numbers)
    return hmac.digest(secret, message, hashlib.sha256)
