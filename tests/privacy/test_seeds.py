"""Seeds of the noise."""

import numpy as np
import pytest

from keras_vaultgemma.privacy.seeds import derive, new_secret, noise_seed

pytestmark = pytest.mark.any_backend


def test_no_seed_comes_twice():
    """Over steps, variables and restarts; chance alone would fail once in 2^102 runs."""
    secrets = [new_secret() for _ in range(4)]
    seeds = [
        noise_seed(s, step, variable)
        for s in secrets
        for step in range(100)
        for variable in range(20)
    ]
    assert len({seed.tobytes() for seed in seeds}) == len(seeds) == 8000


def test_a_restart_that_counts_on_from_an_old_step_draws_other_noise():
    first, second = new_secret(), new_secret()
    assert not np.array_equal(noise_seed(first, 5, 0), noise_seed(second, 5, 0))


def test_all_128_bits_vary():
    """Each bit is 1 in 2000 of 4000 seeds, give or take: six deviations are passed once in 4 million runs of 128 bits."""
    secret = bytes(range(16))
    seeds = np.array([noise_seed(secret, step, 3) for step in range(4000)])
    assert seeds.shape == (4000, 4) and seeds.dtype == np.uint32
    ones = np.unpackbits(seeds.view(np.uint8), axis=1).sum(axis=0, dtype=int)
    assert np.abs(ones - 2000).max() < 6 * np.sqrt(1000)


def test_seeds_are_the_same_everywhere():
    """Of a known secret; a resumed test run must find them again on any machine."""
    expected = derive(bytes(range(16)), "noise", 3, 1)[:16]
    words = [int.from_bytes(expected[i : i + 4], "little") for i in (0, 4, 8, 12)]
    assert noise_seed(bytes(range(16)), 3, 1).tolist() == words
