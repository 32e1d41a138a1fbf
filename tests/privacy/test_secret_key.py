"""Secrets, and what is derived from them."""

import hashlib
import hmac

import pytest

from keras_vaultgemma.privacy import seeds
from keras_vaultgemma.privacy.seeds import NotPrivateWarning, derive, fixed_secret, new_secret

pytestmark = pytest.mark.any_backend


def test_secrets_come_from_the_operating_system(monkeypatch):
    monkeypatch.setattr(seeds.os, "urandom", lambda size: b"\x05" * size)
    assert new_secret() == b"\x05" * 16


def test_no_two_secrets_are_equal():
    assert len({new_secret() for _ in range(1000)}) == 1000


def test_derivation_is_hmac_sha256():
    secret = bytes(range(16))
    message = b"noise\0" + (3).to_bytes(8, "big") + (2**64 - 1).to_bytes(8, "big")
    assert (
        derive(secret, "noise", 3, 2**64 - 1) == hmac.new(secret, message, hashlib.sha256).digest()
    )


def test_purposes_and_numbers_are_kept_apart():
    secret, lists = bytes(16), [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (256,), (2**32,)]
    derived = [
        derive(secret, purpose, *numbers) for purpose in ("a", "ab", "b") for numbers in lists
    ]
    derived += [derive(b"\1" * 16, "a")]
    assert len(set(derived)) == len(derived) == 25


def test_a_fixed_seed_repeats_and_warns():
    with pytest.warns(
        NotPrivateWarning, match=r"A fixed seed \(7\) makes this run repeatable and NOT private"
    ):
        first = fixed_secret(7)
    with pytest.warns(NotPrivateWarning):
        assert (fixed_secret(7), len(first)) == (first, 16)
        assert fixed_secret(8) != first


def test_errors():
    with pytest.raises(ValueError, match="`secret` must have 16 bytes. Received: 15 bytes"):
        derive(bytes(15), "noise", 1)
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match=f"must be from 0 to 2\\^64 - 1. Received: {number}"):
            derive(bytes(16), "noise", number)
