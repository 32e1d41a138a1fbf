import pytest
from served import serving

from keras_vaultgemma.serving.server import load_models


@pytest.fixture(scope="session")
def models():
    return load_models("vaultgemma_tiny")


@pytest.fixture(scope="session")
def served(models):
    with serving(models) as served:
        yield served
