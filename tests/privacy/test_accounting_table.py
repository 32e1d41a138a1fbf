"""ε of a table of settings against finer grids, Rényi differential privacy, Opacus and dp-accounting."""

import math
import time

import numpy as np
import pytest

from keras_vaultgemma.privacy import accounting, loss_grid, planning, step_loss
from keras_vaultgemma.privacy.accounting import Steps

pytestmark = pytest.mark.any_backend

V = int(13e12 / 1024)
TABLE = [
    (Steps(10**6, 10**9, 1e-4, None, 0.8), 1e-8, 1.0019),
    (Steps(10**6, 10**9, 1e-3, None, 2.0), 1e-12, 3.69662),
    (Steps(100_000, V, 518e3 / V, None, 0.614), 1.1e-10, 1.71057),
    (Steps(100_000, V, 518e3 / V, 518_000, 0.614), 1.1e-10, 22.2398),
    (Steps(9800, 10**5, 0.01024, None, 31.7), 1e-5, 0.0982522),
    (Steps(1, 10**3, 1.0, None, 100.0), 1e-5, 0.0272195),
    (Steps(10**6, 10**3, 1.0, None, 100.0), 1e-5, 91.8177),
    (Steps(10**6, 10**3, 0.1, None, 100.0), 1e-5, 4.37739),
    (Steps(10**6, 10**9, 1e-5, None, 100.0), 1e-12, 0.000530488),
    (Steps(10**6, 10**9, 1e-5, None, 0.3), 1e-12, 29.9487),
    (Steps(1, 10**9, 1e-4, None, 0.3), 1e-5, 0.590048),
    (Steps(10, 10**9, 1e-3, None, 0.5), 1e-8, 4.10722),
    (Steps(1000, 10**9, 1e-5, None, 0.5), 1e-8, 0.468174),
    (Steps(10**5, 10**9, 1e-4, None, 0.8), 1e-8, 0.319254),
    (Steps(1000, 10**6, 1e-5, None, 1.0), 1e-12, 0.00703657),
    (Steps(100, 10**3, 0.1, 105, 0.8), 1e-6, 38.372),
    (Steps(1000, 10**5, 0.01, 1100, 0.6), 1e-6, 14.312),
    (Steps(10**4, 10**4, 0.05, None, 10.0), 1e-6, 2.26474),
    (Steps(9, 10**6, 1e-4, None, 0.79), 6e-11, 0.112649),
]
"""Steps, δ and ε with `TOLERANCE` 1e-5, `LARGEST_STEP` 2^20 and `LARGEST_COMPOSITION` 2^22 in
`loss_grid`, whose grids have intervals of 3e-8 to 1e-3: rounded up like any, but by less."""


@pytest.fixture
def cold():
    step_loss.quadrature.cache_clear()
    step_loss.on_grid.cache_clear()


@pytest.mark.parametrize("steps, delta, finer", TABLE)
def test_within_one_percent_of_finer_grids_in_two_seconds(cold, steps, delta, finer):
    before = time.process_time()
    found = accounting.epsilon([steps], delta)
    assert time.process_time() - before < 2
    assert finer * (1 - 1e-5) <= found <= finer * 1.005


@pytest.mark.parametrize("steps, delta, finer", TABLE)
def test_never_above_renyi_differential_privacy(steps, delta, finer):
    """Rényi differential privacy, which bounds ε from above, needs no grid."""
    if steps.max_batch_size is None:
        assert accounting.epsilon([steps], delta) <= renyi_epsilon(steps, delta)


def renyi_epsilon(steps, delta):
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    event = dp_accounting.GaussianDpEvent(steps.noise_multiplier)
    if steps.sampling_probability < 1:
        event = dp_accounting.PoissonSampledDpEvent(steps.sampling_probability, event)
    accountant = RdpAccountant([2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 28, 40, 64, 128, 256])
    return accountant.compose(event, steps.count).get_epsilon(delta)


OPACUS = [
    (0.8, 1e-4, 10**4, 1e-8, 0.16122, 0.161573),
    (0.8, 1e-4, 10**5, 1e-8, 0.31856, 0.319227),
    (2.0, 1e-3, 10**5, 1e-8, 0.85487, 0.856620),
    (0.614, 4.08e-5, 10**4, 1e-8, 0.54001, 0.541214),
    (10.0, 0.05, 10**4, 1e-6, 2.26163, 2.264733),
    (0.5, 1e-3, 100, 1e-6, 3.14107, 3.144503),
    (0.3, 1e-4, 1000, 1e-6, 10.18531, 10.189148),
    (31.7, 0.01024, 9800, 1e-5, 0.09805, 0.098252),
    (1.0, 0.5, 10, 1e-5, 10.45632, 10.459927),
    (5.0, 0.5, 1000, 1e-7, 21.12142, 21.125028),
    (20.0, 0.01, 10**5, 1e-6, 0.64742, 0.648750),
]
"""σ, q, T, δ and ε of Opacus 1.6.0: the lower bound and the estimate of `PRVAccountant`, with an `eps_error`
of 0.2 % of ε, at most 0.003, and a `delta_error` of δ / 1000. It took 0.3 to 60 s a row."""


@pytest.mark.parametrize("sigma, q, count, delta, lower, estimate", OPACUS)
def test_opacus(sigma, q, count, delta, lower, estimate):
    found = accounting.epsilon([Steps(count, 10**9, q, None, sigma)], delta)
    assert lower <= found and estimate * 0.9999 <= found <= estimate * 1.005


@pytest.mark.parametrize(
    "steps, budget, delta, noise",
    [
        # The grid of 1e-3 needed 77.1.
        (Steps(9800, 10**5, 0.01024), 0.1, 1e-5, 31.24),
        (Steps(1, 1000, 1.0), 100.0, 1e-5, 0.0948),
        (Steps(1, 10**5, 0.01), 100.0, 1e-5, 0.0851),
        (Steps(100, 10**7, 1e-5), 100.0, 1e-5, 0.078),
        (Steps(10**5, 10**9, 1e-6), 20.0, 1e-8, 0.2273),
        # q is below δ, so that ε = 0 at any noise.
        (Steps(1, 10, 0.1), 20.0, 0.5, accounting.SMALLEST_NOISE),
    ],
)
def test_a_calibration_takes_less_than_ten_seconds(cold, steps, budget, delta, noise):
    before = time.process_time()
    found = planning.calibrate(steps, budget, delta)
    assert time.process_time() - before < 10
    assert found.noise_multiplier == pytest.approx(noise, rel=2e-3)
    assert accounting.epsilon([found], delta) <= budget


@pytest.mark.parametrize("noise", [0.001, 0.0099, 1e-300])
def test_noise_that_is_no_privacy_is_rejected(noise):
    message = f"`noise_multiplier` must be a finite number of at least 0.01. Received: noise_multiplier={noise}"
    steps = Steps(100, 1000, 0.1, None, noise)
    for call in (
        lambda: accounting.epsilon([steps], 1e-5),
        lambda: accounting.delta([steps], 1.0),
        lambda: planning.plan(1000, 10, 1, 1e-5, noise_multiplier=noise),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_smallest_noise_takes_no_time(cold):
    """Its losses are as large as 1e5, and ε as large as 3e9."""
    before = time.process_time()
    assert accounting.epsilon([Steps(10**6, 100, 0.3, 31, 0.01)], 1e-12) > 1e9
    assert accounting.epsilon([Steps(1, 10, 0.5, None, 0.01)], 1e-12) == pytest.approx(
        5690, rel=1e-2
    )
    assert time.process_time() - before < 10


def test_runs_with_very_different_losses_compose():
    """In order of the ε alone: a step at q = 1 and σ = 0.3; a million steps with losses of 1e-6."""
    large, small = Steps(1, 10_000, 1.0, None, 0.3), Steps(10**6, 10**9, 1e-5, None, 5.0)
    alone = accounting.epsilon([large], 1e-6)
    assert alone < accounting.epsilon([large, small], 1e-6) < alone * 1.001
    # Normal losses add up in closed form: 100 steps of σ = 50 and 10,000 of σ = 2000 have μ² = 0.0425.
    runs = [Steps(100, 10, 1.0, None, 50.0), Steps(10_000, 10, 1.0, None, 2000.0)]
    one = accounting.epsilon([Steps(1, 10, 1.0, None, 1 / math.sqrt(0.0425))], 1e-6)
    assert accounting.epsilon(runs, 1e-6) == pytest.approx(one, rel=2e-3)


def test_runs_of_different_sampling_compose(monkeypatch):
    runs = [
        Steps(100, 10_000, 1.0, None, 50.0),
        Steps(10**6, 10**9, 1e-5, None, 0.7),
        Steps(3, 180, 0.05, 20, 1.0),
        Steps(1000, 10**5, 0.01, 1100, 0.6),
    ]
    found = accounting.epsilon(runs, 1e-6)
    monkeypatch.setattr(loss_grid, "TOLERANCE", 3e-4)
    finer = accounting.epsilon(runs, 1e-6)
    assert finer <= found <= finer * 1.005
    assert found < sum(accounting.epsilon([run], 1e-6 / 4) for run in runs)


def test_the_grid_raises_delta_by_about_one_percent():
    """Of normal losses δ(ε) is known; at ε = 0 it is the total variation distance 2 Φ(μ/2) - 1."""
    for count, sigma in [(1, 1.0), (10_000, 1000.0)]:
        exact = math.erf(math.sqrt(count) / sigma / math.sqrt(8))
        found = accounting.delta([Steps(count, 10, 1.0, None, sigma)], 0.0)
        assert exact <= found <= exact * 1.02
    # VaultGemma's losses are far from normal, and their standard deviation of 0.047 a bound.
    steps = Steps(100_000, V, 518e3 / V, None, 0.614)
    assert 0.018 < accounting.delta([steps], 0.0) < 0.047 / math.sqrt(2 * math.pi)
    assert accounting.delta([steps], 1000.0) < 1e-30


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_random_settings(monkeypatch, seed):
    """8 x 25 settings, next to finer grids."""
    rng = np.random.default_rng(seed)
    coarse = {name: getattr(loss_grid, name) for name in ("TOLERANCE", "LARGEST_STEP")}
    for _ in range(25):
        q = 1.0 if rng.random() < 0.15 else 10 ** rng.uniform(-5, 0)
        rows, bound = int(10 ** rng.uniform(3, 9)), None
        if rng.random() < 0.3 and rows * q > 1:
            bound = math.ceil(rows * q + rng.uniform(0, 6) * math.sqrt(rows * q * (1 - q) + 1))
        sigma = 10 ** rng.uniform(math.log10(0.3 if seed < 6 else 0.01), 2)
        steps = Steps(int(10 ** rng.uniform(0, 6)), rows, q, bound, sigma)
        delta = 10 ** rng.uniform(-12, -5)
        for name, value in coarse.items():
            monkeypatch.setattr(loss_grid, name, value)
        # The faster of two, because a busy machine counts more processor time for the same work.
        seconds = []
        for _ in range(2):
            step_loss.on_grid.cache_clear()
            before = time.process_time()
            found = accounting.epsilon([steps], delta)
            seconds.append(time.process_time() - before)
        assert min(seconds) < 2, (steps, delta)
        monkeypatch.setattr(loss_grid, "TOLERANCE", 1e-5)
        monkeypatch.setattr(loss_grid, "LARGEST_STEP", 2**20)
        finer = accounting.epsilon([steps], delta)
        # See `LARGEST_STEP` for truncated batches.
        share = 1.01 if bound is None or finer > 0.25 else 1.1
        assert finer * (1 - 1e-6) <= found <= finer * share, (steps, delta)


@pytest.mark.long
@pytest.mark.parametrize("row", [4, 5, 10, 11, 12, 15, 16, 17])
def test_dp_accounting_with_a_fine_grid(row):
    """dp-accounting's own accountant, where δ is far above the T x 1e-16 of its Fourier transform."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    steps, delta, _ = TABLE[row]
    interval = 1e-5 if steps.noise_multiplier >= 10 else 1e-4
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, interval)
    if steps.max_batch_size is None:
        event = dp_accounting.GaussianDpEvent(steps.noise_multiplier)
        if steps.sampling_probability < 1:
            event = dp_accounting.PoissonSampledDpEvent(steps.sampling_probability, event)
    else:
        event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            steps.rows, steps.sampling_probability, steps.max_batch_size, steps.noise_multiplier
        )
    theirs = accountant.compose(event, steps.count).get_epsilon(delta)
    assert accounting.epsilon([steps], delta) == pytest.approx(theirs, rel=5e-3)
