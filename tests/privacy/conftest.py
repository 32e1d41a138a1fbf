import pytest


@pytest.fixture(autouse=True)
def own_home(own_key):
    """No test counts the private runs of another one, in whatever order they run."""
