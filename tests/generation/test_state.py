"""Settings that adjust probabilities."""

import pytest

from keras_vaultgemma.generation.state import Settings

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize(
    "settings, adjusts",
    [
        ({}, False),
        (dict(seed=3), False),
        (dict(repetition_penalty=1.1), True),
        (dict(min_p=0.1), True),
        (dict(logit_bias={5: 1.0}), True),
    ],
)
def test_settings_that_adjust_probabilities(settings, adjusts):
    assert Settings(**settings).adjusts is adjusts
