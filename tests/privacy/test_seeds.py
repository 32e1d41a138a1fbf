"""Secrets, and the seeds that are derived from them."""

import hashlib
import hmac
import os

import numpy as np
import pytest

from keras_vaultgemma.privacy.seeds import (
    NotPrivateWarning,
    derive,
    fixed_secret,
    layer_seed,
    new_secret,
    noise_seed,
)

pytestmark = pytest.mark.any_backend


def test_secrets_come_from_the_operating_system(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda size: b"\x05" * size)
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
        with pytest.raises(
            ValueError, match=f"`numbers` must be from 0 to 2\\^64 - 1. Received: {number}"
        ):
            derive(bytes(16), "noise", number)


def test_no_seed_is_used_twice():
    """Over steps, variables and restarts; 8,000 random seeds have two equal ones with probability 2^-103."""
    secrets = [new_secret() for _ in range(4)]
    seeds = [
        noise_seed(s, step, variable)
        for s in secrets
        for step in range(100)
        for variable in range(20)
    ]
    assert len({seed.tobytes() for seed in seeds}) == len(seeds) == 8000


def test_a_restart_that_repeats_a_step_draws_other_noise():
    first, second = new_secret(), new_secret()
    assert not np.array_equal(noise_seed(first, 5, 0), noise_seed(second, 5, 0))


def test_all_128_bits_vary():
    """Each bit is 1 in about 2000 of 4000 seeds: a bound of six deviations fails for one in 4 million secrets."""
    secret = bytes(range(16))
    seeds = np.array([noise_seed(secret, step, 3) for step in range(4000)])
    assert seeds.shape == (4000, 4) and seeds.dtype == np.uint32
    ones = np.unpackbits(seeds.view(np.uint8), axis=1).sum(axis=0, dtype=int)
    assert np.abs(ones - 2000).max() < 6 * np.sqrt(1000)


def test_seeds_are_the_same_everywhere():
    """A test run with a known secret can be repeated on any machine."""
    expected = derive(bytes(range(16)), "noise", 3, 1)[:16]
    words = [int.from_bytes(expected[i : i + 4], "little") for i in (0, 4, 8, 12)]
    assert noise_seed(bytes(range(16)), 3, 1).tolist() == words


def test_layer_seeds_are_two_numbers_of_31_bits():
    seeds = np.array([layer_seed(bytes(range(16)), step, 0) for step in range(100)])
    assert seeds.dtype == np.int32 and seeds.shape == (100, 2) and seeds.min() >= 0
    assert len({seed.tobytes() for seed in seeds}) == 100
    assert not np.array_equal(layer_seed(bytes(16), 0, 0), layer_seed(bytes(16), 0, 1))
