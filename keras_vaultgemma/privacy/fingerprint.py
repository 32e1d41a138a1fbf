"""A data set's fingerprint: tells whether two runs used the same rows, and tells a stranger nothing.

A plain hash would be a hole in the guarantee: whoever knows all rows but one could try candidates for that one until
the hash fits, and no noise protects from that. Fingerprints are therefore keyed (BLAKE2b, RFC 7693) with 256 random
bits that stay in the user's own folder. A key has a public name; fingerprints under different keys cannot be compared,
and count as the same data, so that a lost key never makes ε smaller.
"""

import hashlib
import os

import numpy as np

from keras_vaultgemma.checkpoints import presets

KEY_FILE = "dataset_fingerprint.key"
KEY_SIZE = 32


def key(folder=None):
    """The user's key, 32 bytes; drawn and written, readable for the user alone, where there is none.

    Args:
        folder: where it is kept; `presets.cache_home()` if None.

    Raises:
        ValueError: where the file holds something else.
    """
    path = (presets.cache_home() if folder is None else folder) / KEY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        found = path.read_bytes()
    else:
        found = os.urandom(KEY_SIZE)
        with open(descriptor, "wb") as file:
            file.write(found)
            file.flush()
            os.fsync(file.fileno())
    if len(found) != KEY_SIZE:
        raise ValueError(
            f"{path} must have {KEY_SIZE} bytes. Received: {len(found)}; remove it for a new key"
        )
    return found


def fingerprint(rows, key):
    """The fingerprint of some rows, whatever their order.

    Args:
        rows: iterable of str, bytes or integer arrays.
        key: 32 bytes.

    Returns:
        str: name of the key, a colon, 128 bits of digest in hexadecimal.
    """
    count, total = 0, 0
    for row in rows:
        if isinstance(row, str):
            content = b"text" + row.encode("utf-8", "surrogatepass")
        elif isinstance(row, bytes):
            content = b"byte" + row
        else:
            content = b"ints" + np.asarray(row).astype("<i8").tobytes()
        # A sum does not depend on the order, and rows that stand there twice count twice.
        total += int.from_bytes(_digest(content, key), "big")
        count += 1
    content = b"sum " + (total % 2**256).to_bytes(32, "big") + count.to_bytes(8, "big")
    return f"{_digest(b'name', key).hex()[:8]}:{_digest(content, key).hex()[:32]}"


def rows_of(arrays):
    """Rows of a list of arrays [N, ...] for `fingerprint`: the same numbers are the same row, whatever their dtype.

    Returns:
        Iterator of N bytes.
    """
    for parts in zip(*arrays, strict=True):
        # float64 has every id; the sum makes 0.0 of -0.0.
        yield b"".join((np.asarray(part).astype("<f8") + 0.0).tobytes() for part in parts)


def may_be_equal(one, other):
    """Whether two fingerprints may belong to the same data: they are equal, or have different keys."""
    return one == other or one.partition(":")[0] != other.partition(":")[0]


def _digest(content, key):
    return hashlib.blake2b(content, key=key, digest_size=32).digest()
