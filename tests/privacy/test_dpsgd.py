import pytest

from keras_vaultgemma.privacy import DPSGD, NotPrivateWarning

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {},
            "Exactly one of `epsilon` and `noise_multiplier` must be given. Received: epsilon=None",
        ),
        (
            dict(epsilon=1, noise_multiplier=1),
            "Exactly one of .* Received: epsilon=1, noise_multiplier=1",
        ),
        (
            dict(epsilon=0),
            "`epsilon` must be None or a number above 0 and at most 100. Received: epsilon=0",
        ),
        (dict(epsilon=101), "Received: epsilon=101"),
        (dict(epsilon=float("nan")), "Received: epsilon=nan"),
        (
            dict(epsilon=1, delta=0),
            "`delta` must be a number above 0 and below 1. Received: delta=0",
        ),
        (dict(epsilon=1, delta=1.0), "Received: delta=1.0"),
        (
            dict(noise_multiplier=0),
            "`noise_multiplier` must be None or a finite number of at least 0.01. Received: noise_multiplier=0",
        ),
        (dict(noise_multiplier=float("inf")), "Received: noise_multiplier=inf"),
        (
            dict(epsilon=1, clip_norm=0),
            "`clip_norm` must be a number from 1e-08 to 1e.08. Received: clip_norm=0",
        ),
        (dict(epsilon=1, clip_norm=float("nan")), "Received: clip_norm=nan"),
        (
            dict(epsilon=1, unit="person"),
            "`unit` must be one of 'row', 'sequence', 'user'. Received: unit='person'",
        ),
        (
            dict(epsilon=1, microbatch_size=0),
            "`microbatch_size` must be None or a positive integer. Received: .*=0",
        ),
        (dict(epsilon=1, microbatch_size=True), "Received: microbatch_size=True"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        DPSGD(**arguments)


def test_every_call_returns_a_new_secret():
    settings = DPSGD(epsilon=1)
    assert settings.secret() != settings.secret() and len(settings.secret()) == 16


def test_the_mechanism_of_a_seeded_run_is_marked():
    assert DPSGD(epsilon=1).mechanism == "DP-SGD with truncated Poisson sampling"
    seeded = DPSGD(epsilon=1, seed_for_tests=0).mechanism
    assert seeded == "NOT private, seeded for tests: DP-SGD with truncated Poisson sampling"


def test_a_seed_repeats_and_warns():
    with pytest.warns(NotPrivateWarning, match="NOT private"):
        one = DPSGD(epsilon=1, seed_for_tests=3).secret()
    with pytest.warns(NotPrivateWarning):
        assert one == DPSGD(epsilon=1, seed_for_tests=3).secret()
    with pytest.warns(NotPrivateWarning):
        assert one != DPSGD(epsilon=1, seed_for_tests=4).secret()


def test_the_docstring_states_the_guarantee():
    """Mechanism, unit, neighbours, what is released and what is not covered, with references."""
    docstring = DPSGD.__doc__
    for words in (
        "**Guarantee.**",
        "zero-out neighbours",
        "**Mechanism.**",
        "truncated Poisson",
        "**Unit.**",
        "Not covered",
    ):
        assert words in docstring
    for words in (
        "hyperparameters",
        "metrics",
        "checkpoint",
        "arxiv.org/abs/1607.00133",
        "arxiv.org/abs/2411.04205",
        "arxiv.org/abs/2510.15001",
    ):
        assert words in docstring
