"""Fingerprints of data sets, which tell if two runs used the same records and nothing more.

A plain hash would break the privacy guarantee: an attacker who knows all records but one could try
candidates for that one until the hash matches, and no noise protects against that. A fingerprint is
therefore keyed (BLAKE2b) with 256 random bits that stay in a folder of the user.

Keys have a public name. Fingerprints under different keys cannot be compared and count as the same
data, so that ε is never under-reported after a key was lost.

A sketch has the digest of every record, and tells which records two data sets have in common. With
the key anybody can test if a record is in it, so that it stays in the same folder as the key.

References:
    - [RFC 7693](https://www.rfc-editor.org/rfc/rfc7693): BLAKE2
"""

import hashlib
import os
import unicodedata
from pathlib import Path

import numpy as np

from keras_vaultgemma.checkpoints import presets

KEY_FILE = "dataset_fingerprint.key"
KEY_SIZE = 32
"""Bytes of a key."""

SKETCH_SIZE = 2**22
"""Largest number of digests of a sketch, 32 MB. Of more records those with the smallest digests are
kept, a random sample in which the same records are kept of all data sets."""


def key(folder: Path | None = None) -> bytes:
    """Return the user's key, and create it if there is none.

    A file of another length, which a full disk or a crash may leave, is replaced: fingerprints
    under its key count as the same data as all others from then on.

    Args:
        folder: `pathlib.Path`. Folder of the key file, which only the user can read. Defaults to
            `presets.cache_home()`.

    Returns:
        bytes of length 32.
    """
    path = (presets.cache_home() if folder is None else folder) / KEY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _is_key(path):
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(KEY_SIZE))
            file.flush()
            os.fsync(file.fileno())
        try:
            if path.exists():  # of another length
                new.replace(path)
            else:
                os.link(new, path)  # unless another process has just created it
        except FileExistsError:
            pass
        except OSError:  # The file system has no links.
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    return path.read_bytes()


def _is_key(path):
    return path.is_file() and path.stat().st_size == KEY_SIZE


def fingerprint(records, key: bytes) -> str:
    """Return the fingerprint of some records, which does not depend on their order.

    Args:
        records: iterable of str, bytes or integer arrays.
        key: bytes of length 32.

    Returns:
        str. The name of the key, a colon, and a digest of 128 bits in hexadecimal.

    Example:

    ```python
    from keras_vaultgemma.privacy.fingerprint import fingerprint

    key = bytes(32)
    assert fingerprint(["one", "two"], key) == fingerprint(["two", "one"], key)
    ```
    """
    count, total = 0, 0
    for record in records:
        # A sum, because it ignores the order but counts each duplicate.
        total += int.from_bytes(_digest(_content(record), key), "big")
        count += 1
    content = b"sum " + (total % 2**256).to_bytes(32, "big") + count.to_bytes(8, "big")
    return f"{_digest(b'name', key).hex()[:8]}:{_digest(content, key).hex()[:32]}"


def rows_of(arrays):
    """Yield the rows of arrays as bytes for `fingerprint`; equal numbers of any dtype are equal.

    Args:
        arrays: list of arrays of shape `[N, ...]`.

    Yields:
        N bytes objects.
    """
    for parts in zip(*arrays, strict=True):
        # float64 represents every token id exactly, and adding 0.0 turns -0.0 into 0.0.
        yield b"".join((np.asarray(part).astype("<f8") + 0.0).tobytes() for part in parts)


class RowSketch:
    """Digests of single records, collected while their fingerprint is computed.

    Two texts are the same record if they have the same letters and digits in the same order, so
    that another space, case, line break or punctuation does not hide a record. The chance that two
    different records have the same digest of 64 bits is 5e-8 for two data sets of a million.

    Args:
        key: bytes of length 32.

    Example:

    ```python
    from keras_vaultgemma.privacy.fingerprint import RowSketch, fingerprint, rows_in_common

    key, one, other = bytes(32), RowSketch(bytes(32)), RowSketch(bytes(32))
    fingerprint(one.watch(["A cold.", "A cough."]), key)
    fingerprint(other.watch(["A cough. ", "A fever."]), key)
    assert rows_in_common(one.values(), other.values()) == 1
    ```
    """

    def __init__(self, key: bytes):
        self._key = key
        self._digests: list[int] = []

    def watch(self, records):
        """Yield the records, and collect their digests.

        Args:
            records: iterable of str, bytes or integer arrays.
        """
        for record in records:
            if isinstance(record, str):
                content = b"text" + _letters(record).encode("utf-8", "surrogatepass")
            else:
                content = _content(record)
            self._digests.append(int.from_bytes(_digest(b"row " + content, self._key)[:8], "big"))
            yield record

    def values(self) -> np.ndarray:
        """Return the digests, a sorted uint64 array of shape `[n]` without duplicates."""
        return np.unique(np.array(self._digests, "uint64"))[:SKETCH_SIZE]


def rows_in_common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many different records two sketches have in common; they may be samples."""
    return len(np.intersect1d(one, other, assume_unique=True))


def have_same_key(one: str, other: str) -> bool:
    """Return True if two fingerprints, and the sketches with them, are under the same key."""
    return one.partition(":")[0] == other.partition(":")[0]


def may_be_equal(one: str, other: str) -> bool:
    """Return True if two fingerprints may be of the same data: equal, or under different keys."""
    return one == other or not have_same_key(one, other)


def _content(record):
    if isinstance(record, str):
        return b"text" + record.encode("utf-8", "surrogatepass")
    if isinstance(record, bytes):
        return b"byte" + record
    return b"ints" + np.asarray(record).astype("<i8").tobytes()


def _letters(text):
    """Return the letters and digits of a text, without what no reader sees as a difference."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, folded)) or folded


def _digest(content, key):
    return hashlib.blake2b(content, key=key, digest_size=32).digest()
