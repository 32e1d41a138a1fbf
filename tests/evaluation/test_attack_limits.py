"""What a privacy guarantee allows a membership attack, next to the exact limits of Gaussian noise."""

import numpy as np
import pytest
from scipy.stats import norm

from keras_vaultgemma.evaluation import attack_limits
from keras_vaultgemma.privacy.accounting import Steps

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
def test_limits_of_gaussian_noise(mu):
    """N steps on all records with noise σ are one with σ / √N, whose best attack is known."""
    steps = Steps(4, 100, 1.0, None, noise_multiplier=2 / mu)
    found = attack_limits([steps])
    assert 0 <= found.accuracy - norm.cdf(mu / 2) < 0.003
    assert 0 <= found.auc - norm.cdf(mu / np.sqrt(2)) < 0.005
    for rate, limit in found.true_positive_rates.items():
        exact = norm.cdf(norm.ppf(rate) + mu)
        assert 0 <= limit - exact < 0.1 * exact


@pytest.mark.long
def test_extremes():
    nothing = attack_limits([Steps(0, 100, 0.1, None, 1.0)])
    assert (nothing.accuracy, nothing.auc) == (0.5, 0.5)
    assert nothing.true_positive_rates == {0.01: 0.01, 0.001: 0.001}
    everything = attack_limits([Steps(1000, 100, 1.0, None, 0.1)])
    assert (everything.accuracy, everything.auc) == (1.0, 1.0)
    assert everything.as_dict()["true_positive_rates"] == {"0.01": 1.0, "0.001": 1.0}
