"""ε and δ against closed forms, other accountants and mistakes that make ε too small."""

import math

import pytest
from scipy import optimize, special

from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.accounting import PrivacySpent, Steps

pytestmark = pytest.mark.any_backend

VAULTGEMMA = Steps(100_000, int(13e12 / 1024), 518e3 / int(13e12 / 1024), None, 0.614)


def gaussian_delta(epsilon, mu):
    """δ of the Gaussian mechanism with sensitivity / deviation = mu (Balle & Wang, 2018, arXiv:1805.06083, Theorem 8)."""
    return math.exp(special.log_ndtr(mu / 2 - epsilon / mu)) - math.exp(
        epsilon + special.log_ndtr(-mu / 2 - epsilon / mu)
    )


def gaussian_epsilon(delta, mu):
    return optimize.brentq(lambda e: gaussian_delta(e, mu) - delta, 0, 500, xtol=1e-12)


@pytest.mark.parametrize("count, sigma", [(1, 1.0), (1, 0.5), (30, 4.0), (400, 20.0)])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-10, 1e-15])
def test_full_batches_have_a_closed_form(count, sigma, delta):
    """q = 1: T steps are one Gaussian mechanism with σ / sqrt(T)."""
    exact = gaussian_epsilon(delta, math.sqrt(count) / sigma)
    found = accounting.epsilon([Steps(count, 100, 1.0, None, sigma)], delta)
    assert exact <= found <= exact * 1.001
    again = accounting.delta([Steps(count, 100, 1.0, None, sigma)], exact)
    assert delta <= again <= delta * 1.01


@pytest.mark.parametrize(
    "rows, epsilon", [(int(13e12 / 1024), 1.7105), (9_800_000_000, 1.9859), (1 / 1.1e-10, 2.0686)]
)
def test_vaultgemma(rows, epsilon):
    """ε of the recipe on finer grids, for three numbers of sequences. dp-accounting's 1.7092 is too small (see
    `loss_distribution`)."""
    steps = VAULTGEMMA._replace(rows=int(rows), sampling_probability=518e3 / rows)
    found = accounting.epsilon([steps], 1.1e-10)
    assert epsilon <= found <= epsilon * 1.0025


def test_vaultgemma_truncated_at_the_expected_batch_size():
    """Batches truncated at the expected size are not Poisson samples: ε is 22, not 1.7."""
    truncated = VAULTGEMMA._replace(max_batch_size=518_000)
    assert accounting.epsilon([truncated], 1.1e-10) == pytest.approx(22.24, abs=0.05)
    assert accounting.epsilon(
        [truncated._replace(max_batch_size=523_180)], 1.1e-10
    ) == pytest.approx(1.711, abs=4e-3)


OPACUS = [
    (1.0, 0.01, 1000, 1e-5, 1.8293687315675626),
    (0.7, 0.005, 600, 1e-5, 2.1833391623525147),
    (2.0, 0.1, 500, 1e-6, 6.217972685576559),
    (5.0, 0.5, 200, 1e-5, 6.7025075271783034),
    (0.8, 0.001, 10000, 1e-7, 1.1718802139529192),
    (1.5, 0.02, 3000, 1e-8, 4.814604641087898),
]
"""σ, q, T, δ and ε of Opacus 1.6.0: `PRVAccountant`, history [(σ, q, T)], `get_epsilon(δ, eps_error=0.001,
delta_error=δ / 1000)`. Without truncation, add-or-remove adjacency has the privacy loss of zero-out adjacency."""


@pytest.mark.parametrize("sigma, q, count, delta, epsilon", OPACUS)
def test_opacus(sigma, q, count, delta, epsilon):
    assert accounting.epsilon([Steps(count, 10**6, q, None, sigma)], delta) == pytest.approx(
        epsilon, rel=0.01
    )


def test_opacus_composes_different_runs():
    """Opacus with history [(1.0, 0.01, 500), (1.3, 0.02, 300)], δ = 1e-5."""
    runs = [Steps(500, 10**6, 0.01, None, 1.0), Steps(300, 10**6, 0.02, None, 1.3)]
    assert accounting.epsilon(runs, 1e-5) == pytest.approx(1.853169652793984, rel=0.01)


@pytest.mark.parametrize(
    "steps",
    [
        Steps(1000, 10_000, 0.01, None, 1.0),
        Steps(1000, 10_000, 0.01, 130, 1.0),
        Steps(200, 1000, 0.1, 105, 1.2),
        Steps(50, 100, 1.0, None, 7.0),
    ],
)
def test_dp_accounting(steps):
    """dp-accounting's own accountant, with T and δ for which the rounding errors of its Fourier transform are small."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-3)
    if steps.max_batch_size is None:
        event = dp_accounting.GaussianDpEvent(steps.noise_multiplier)
        event = dp_accounting.PoissonSampledDpEvent(steps.sampling_probability, event)
    else:
        event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            steps.rows, steps.sampling_probability, steps.max_batch_size, steps.noise_multiplier
        )
    accountant.compose(event, steps.count)
    # Our grids contain theirs, so that ours round up by less.
    theirs = accountant.get_epsilon(1e-5)
    assert theirs * 0.985 <= accounting.epsilon([steps], 1e-5) <= theirs * (1 + 1e-6)
    assert accounting.delta([steps], 1.0) == pytest.approx(accountant.get_delta(1.0), rel=5e-2)


def test_accumulated_micro_batches_are_not_one_poisson_sample():
    """The sum of k independently drawn micro-batches contains a record up to k times. It amounts to k steps, each with a
    k-th of the expected rows and of the noise's variance, which cost far more than one step with the sum of them."""
    k = 8
    claimed = accounting.epsilon([Steps(500, 10_000, 0.0256, None, 1.0)], 1e-5)
    honest = accounting.epsilon(
        [Steps(k * 500, 10_000, 0.0256 / k, None, 1.0 / math.sqrt(k))], 1e-5
    )
    assert claimed == pytest.approx(3.62, abs=0.01)
    assert honest > 9 * claimed


def test_truncation_never_lowers_epsilon():
    base = Steps(500, 10_000, 0.0256, None, 1.0)
    values = [
        accounting.epsilon([base._replace(max_batch_size=b)], 1e-5)
        for b in (256, 280, 300, 320, 400)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > 2 * values[-1]
    assert values[-1] == pytest.approx(accounting.epsilon([base], 1e-5), rel=1e-6)
    # A batch that may have all records is never truncated.
    assert accounting.epsilon([base._replace(max_batch_size=10_000)], 1e-5) == accounting.epsilon(
        [base], 1e-5
    )


def test_runs_compose():
    steps = Steps(100, 1000, 0.1, None, 1.5)
    whole = accounting.epsilon([steps._replace(count=200)], 1e-5)
    assert accounting.epsilon([steps, steps], 1e-5) == pytest.approx(whole, rel=1e-9)
    assert accounting.epsilon([steps, steps._replace(noise_multiplier=3.0)], 1e-5) < whole
    assert accounting.epsilon([steps, steps._replace(count=0)], 1e-5) == accounting.epsilon(
        [steps], 1e-5
    )
    assert accounting.epsilon([], 1e-5) == accounting.epsilon([steps._replace(count=0)], 1e-5) == 0


def test_epsilon_grows_with_every_step():
    steps = Steps(1, 1000, 0.1, 130, 1.5)
    values = [
        accounting.epsilon([steps._replace(count=count)], 1e-5) for count in (1, 2, 5, 20, 100)
    ]
    assert values == sorted(values) and values[0] > 0


@pytest.mark.parametrize(
    "value, rounded", [(0.0, 0.0), (1.0, 1.0), (2.96541, 2.966), (9.9995, 10.0), (1.23e-5, 1.23e-5)]
)
def test_round_up(value, rounded):
    assert accounting.round_up(value) == rounded
    assert accounting.round_up(math.inf) == math.inf


def test_round_up_never_rounds_down():
    for value in (
        0.1 + 0.2,
        math.pi,
        1 / 3,
        123456.789,
        math.nextafter(2.0, 3),
        math.nextafter(0.3, 1),
    ):
        assert value <= accounting.round_up(value) <= value * 1.001


def test_spent():
    runs = [Steps(100, 1000, 0.1, None, 1.5), Steps(50, 1000, 0.1, None, 2.0)]
    spent = accounting.spent(runs, 1e-5, "one row")
    exact = accounting.epsilon(runs, 1e-5)
    assert exact <= spent.epsilon < exact + 1e-2
    rest = (1e-5, 150, "DP-SGD with truncated Poisson sampling", "one row", "zero-out")
    assert spent == PrivacySpent(spent.epsilon, *rest)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(count=-1), "`count` must be an integer of at least 0. Received: count=-1"),
        (dict(count=1.5), "`count` must be an integer of at least 0. Received: count=1.5"),
        (dict(rows=0), "`rows` must be a positive integer. Received: rows=0"),
        (
            dict(max_batch_size=0),
            "`max_batch_size` must be None or a positive integer. Received: max_batch_size=0",
        ),
        (
            dict(sampling_probability=0.0),
            "`sampling_probability` must be a number above 0 and at most 1. Received: sampling_p",
        ),
        (
            dict(sampling_probability=1.1),
            "`sampling_probability` must be a number above 0 and at most 1. Received: sampling_p",
        ),
        (
            dict(sampling_probability=math.nan),
            "`sampling_probability` must be a number above 0 and at most 1. Received: sam",
        ),
        (
            dict(noise_multiplier=0.0),
            "`noise_multiplier` must be a finite number of at least 0.01. Received: noise_multiplier=0.0",
        ),
        (
            dict(noise_multiplier=math.inf),
            "`noise_multiplier` must be a finite number of at least 0.01. Received: noise_multiplier=",
        ),
        (
            dict(noise_multiplier=None),
            "`noise_multiplier` must be a finite number of at least 0.01. Received: noise_multiplier=None",
        ),
    ],
)
def test_impossible_steps(changes, message):
    with pytest.raises(ValueError) as error:
        accounting.epsilon([Steps(10, 100, 0.1, 20, 1.0)._replace(**changes)], 1e-5)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_impossible_delta(delta):
    with pytest.raises(
        ValueError, match="`delta` must be a number above 0 and below 1. Received: delta="
    ):
        accounting.epsilon([Steps(10, 100, 0.1, 20, 1.0)], delta)


def test_impossible_epsilon():
    with pytest.raises(
        ValueError, match="`epsilon` must be a finite number of at least 0. Received: epsilon=-1"
    ):
        accounting.delta([], -1)
