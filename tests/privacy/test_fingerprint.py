"""Fingerprints of data sets."""

import numpy as np
import pytest

from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.privacy import fingerprint

pytestmark = pytest.mark.any_backend

KEY, OTHER = b"k" * 32, b"o" * 32
ROWS = ["one", "two", "two", "three"]


def test_order_does_not_matter_and_rows_do():
    found = fingerprint.fingerprint(ROWS, KEY)
    assert fingerprint.fingerprint(reversed(ROWS), KEY) == found
    others = [
        ROWS[:-1],
        [*ROWS, "two"],
        ["one", "two", "twothree"],
        ["one", "one", "two", "three"],
        [],
        [""],
    ]
    assert len({fingerprint.fingerprint(rows, KEY) for rows in [ROWS, *others]}) == 7


def test_kinds_of_rows_are_kept_apart():
    ids = np.array([97, 98])
    kinds = [["ab"], [b"ab"], [ids], [np.array([[97], [98]]) + 1]]
    assert len({fingerprint.fingerprint(rows, KEY) for rows in kinds}) == 4
    assert fingerprint.fingerprint([ids.astype("int32")], KEY) == fingerprint.fingerprint(
        [ids.tolist()], KEY
    )


def test_rows_of_arrays_are_their_numbers():
    arrays = [np.arange(6).reshape(2, 3), np.array([0.0, 1.0])]
    found = fingerprint.fingerprint(fingerprint.rows_of(arrays), KEY)
    for dtype in ("int32", "uint8", "float32"):
        others = [array.astype(dtype) for array in arrays]
        assert fingerprint.fingerprint(fingerprint.rows_of(others), KEY) == found
    assert (
        fingerprint.fingerprint(fingerprint.rows_of([arrays[0], -arrays[1] * [1, -1]]), KEY)
        == found
    )
    assert fingerprint.fingerprint(fingerprint.rows_of([arrays[0], arrays[1] + 1]), KEY) != found


def test_without_the_key_a_fingerprint_says_nothing():
    """Whoever tries candidates for a row has to know the key: under another one all of it differs."""
    one, other = fingerprint.fingerprint(ROWS, KEY), fingerprint.fingerprint(ROWS, OTHER)
    assert one.split(":")[0] != other.split(":")[0] and one.split(":")[1] != other.split(":")[1]
    assert [len(part) for part in one.split(":")] == [8, 32]


def test_what_cannot_be_compared_may_be_equal():
    one, changed = fingerprint.fingerprint(ROWS, KEY), fingerprint.fingerprint(ROWS[1:], KEY)
    assert fingerprint.may_be_equal(one, one)
    assert not fingerprint.may_be_equal(one, changed)
    assert fingerprint.may_be_equal(one, fingerprint.fingerprint(ROWS[1:], OTHER))


def test_the_key_is_drawn_once_and_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))
    key = fingerprint.key()
    path = presets.cache_home() / fingerprint.KEY_FILE
    assert (fingerprint.key(), path.read_bytes(), len(key)) == (key, key, 32)
    assert path.stat().st_mode & 0o077 == 0
    assert fingerprint.key(tmp_path) != key


def test_a_damaged_key(tmp_path):
    (tmp_path / fingerprint.KEY_FILE).write_bytes(b"short")
    with pytest.raises(
        ValueError,
        match=r"dataset_fingerprint.key must have 32 bytes. Received: 5; remove it for a new",
    ):
        fingerprint.key(tmp_path)
