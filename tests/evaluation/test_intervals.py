"""Confidence intervals of rates and of statistics."""

import numpy as np
import pytest
from scipy import stats

from keras_vaultgemma.evaluation import Rate
from keras_vaultgemma.evaluation.intervals import bootstrap, clopper_pearson

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("count, total", [(0, 1200), (3, 40), (40, 40), (1, 1)])
def test_clopper_pearson(count, total):
    expected = stats.binomtest(count, total).proportion_ci(0.9, method="exact")
    assert clopper_pearson(count, total, 0.9) == pytest.approx((expected.low, expected.high))


def test_a_rate_says_what_it_is_of():
    rate = Rate.of(0, 1200)
    assert rate.at_most == pytest.approx(1 - 0.05 ** (1 / 1200))
    assert str(rate) == "0 of 1,200, at most 0.25 % (95 % confidence)"
    assert str(Rate.of(12, 120)) == "12 of 120, 5.3 % to 17 % (95 % confidence)"
    nothing = Rate.of(0, 0)
    assert (nothing.low, nothing.high) == (0.0, 1.0)
    assert nothing.as_dict()["value"] is None


def test_the_bootstrap_of_a_mean_is_the_normal_interval():
    x = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(lambda x: np.array([x.mean()]), [x])
    expected = stats.norm.interval(0.95, x.mean(), x.std() / 20)
    assert (low[0], high[0]) == pytest.approx(expected, abs=0.01)
