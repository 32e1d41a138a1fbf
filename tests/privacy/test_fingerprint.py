"""Fingerprints of data sets, and the key that protects them."""

import os
import stat

import numpy as np
import pytest

from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.privacy import fingerprint

pytestmark = pytest.mark.any_backend

KEY, OTHER = b"k" * 32, b"o" * 32
RECORDS = ["one", "two", "two", "three"]


def test_a_fingerprint_ignores_the_order_and_nothing_else():
    found = fingerprint.fingerprint(RECORDS, KEY)
    assert fingerprint.fingerprint(reversed(RECORDS), KEY) == found
    others = [
        RECORDS[:-1],
        [*RECORDS, "two"],
        ["one", "two", "twothree"],
        ["one", "one", "two", "three"],
        [],
        [""],
    ]
    assert len({fingerprint.fingerprint(records, KEY) for records in [RECORDS, *others]}) == 7


def test_duplicates_do_not_cancel():
    """Digests are added: by exclusive or, two equal records would vanish, whatever they are."""
    one, other = ["one", "two", "two"], ["one", "three", "three"]
    assert fingerprint.fingerprint(one, KEY) != fingerprint.fingerprint(other, KEY)


def test_types_of_records_are_distinguished():
    ids = np.array([97, 98])
    kinds = [["ab"], [b"ab"], [ids], [np.array([[97], [98]]) + 1]]
    assert len({fingerprint.fingerprint(rows, KEY) for rows in kinds}) == 4
    assert fingerprint.fingerprint([ids.astype("int32")], KEY) == fingerprint.fingerprint(
        [ids.tolist()], KEY
    )


def test_rows_of_arrays_are_compared_by_value():
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


def test_a_fingerprint_depends_on_the_key():
    """An attacker who tries candidates for a record needs the key, because all of a fingerprint depends on it."""
    one, other = fingerprint.fingerprint(RECORDS, KEY), fingerprint.fingerprint(RECORDS, OTHER)
    assert one.split(":")[0] != other.split(":")[0] and one.split(":")[1] != other.split(":")[1]
    assert [len(part) for part in one.split(":")] == [8, 32]


def test_fingerprints_under_different_keys_may_be_equal():
    one, changed = fingerprint.fingerprint(RECORDS, KEY), fingerprint.fingerprint(RECORDS[1:], KEY)
    assert fingerprint.may_be_equal(one, one)
    assert not fingerprint.may_be_equal(one, changed)
    assert fingerprint.may_be_equal(one, fingerprint.fingerprint(RECORDS[1:], OTHER))


def test_the_key_is_created_once_and_only_its_user_can_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))
    key = fingerprint.key()
    path = presets.cache_home() / fingerprint.KEY_FILE
    assert (fingerprint.key(), path.read_bytes(), len(key)) == (key, key, 32)
    assert path.stat().st_mode & 0o077 == 0
    assert fingerprint.key(tmp_path) != key


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_key_is_replaced(tmp_path, content):
    """A full disk or a crash must not lock the user out."""
    path = tmp_path / fingerprint.KEY_FILE
    path.write_bytes(content)
    key = fingerprint.key(tmp_path)
    assert len(key) == 32 and fingerprint.key(tmp_path) == path.read_bytes() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(tmp_path) == [path.name]
