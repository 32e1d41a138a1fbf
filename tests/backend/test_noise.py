"""Noise: normal, of unit variance, and different for each seed."""

import itertools

import numpy as np
import pytest
from common import to_numpy
from keras import ops
from scipy import stats

from keras_vaultgemma import backend
from keras_vaultgemma.privacy.seeds import noise_seed

DRAWS = 100_000


def noise(secret, step, variable, shape=(DRAWS,)):
    seed = ops.convert_to_tensor(noise_seed(secret, step, variable).view("int32"))
    return to_numpy(backend.normal(seed, shape))


def test_mean_variance_and_normality():
    """Within bounds that a correct generator misses once in 10,000 runs."""
    found = noise(bytes(16), 0, 0).astype("float64")
    assert found.shape == (DRAWS,)
    assert abs(found.mean()) < 4 / DRAWS**0.5
    assert abs(found.var() - 1) < 4 * (2 / DRAWS) ** 0.5
    assert abs((found**4).mean() - 3) < 4 * (96 / DRAWS) ** 0.5
    assert stats.kstest(found, "norm").pvalue > 1e-3


def test_the_tails_are_there():
    found = noise(bytes(16), 0, 0)
    for bound in (2, 3, 3.5):
        expected = 2 * stats.norm.sf(bound) * DRAWS
        assert abs((np.abs(found) > bound).sum() - expected) < 4 * expected**0.5


def test_steps_variables_and_secrets_are_independent():
    """A restart has another secret (secret_key.py)."""
    streams = [
        noise(secret, step, variable)
        for secret, step, variable in itertools.product(
            (bytes(16), bytes(15) + b"\1"), (0, 1), (0, 1)
        )
    ]
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 5 / DRAWS**0.5
    assert len({stream[:4].tobytes() for stream in streams}) == len(streams)


def test_the_same_seed_gives_the_same_noise():
    np.testing.assert_array_equal(noise(bytes(16), 3, 1, (5, 7)), noise(bytes(16), 3, 1, (5, 7)))
    assert noise(bytes(16), 3, 1, (5, 7)).dtype == np.float32


@pytest.mark.parametrize("word", range(4))
@pytest.mark.parametrize("bit", [0, 31])
def test_every_bit_of_the_seed_counts(word, bit):
    seeds = np.full((2, 4), 7, "uint32")
    seeds[1, word] ^= np.uint32(1 << bit)
    one, other = (
        to_numpy(backend.normal(ops.convert_to_tensor(seed), (64,))) for seed in seeds.view("int32")
    )
    assert not np.any(one == other)
