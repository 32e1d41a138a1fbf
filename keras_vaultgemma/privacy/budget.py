"""The budget of a private run: what earlier runs have spent, and how many steps the rest allows."""

import warnings

from keras_vaultgemma._version import __version__
from keras_vaultgemma.privacy import accounting, checks, fingerprint, planning
from keras_vaultgemma.privacy.ledger import Run

USED_UP = 0.99
"""Fraction of a budget after which no further run begins, because the noise that the rest allows
would drown every gradient."""


def plan_run(known, settings, dataset, unit, shape, done, is_resumed):
    """Return a `Run` and True if it ends before the requested number of steps."""
    delta = planning.default_delta(shape["rows"]) if settings.delta is None else settings.delta
    planning.warn_of_large_delta(shape["rows"], delta)
    earlier = known.on(dataset)
    units = (run.unit for run, _ in known.runs if fingerprint.may_be_equal(run.dataset, dataset))
    checks.warn_of_other_units(units, unit)
    spent = accounting.epsilon(earlier, delta) if earlier else 0.0
    requested = max(
        0, shape["epochs"] * planning.steps_per_epoch(shape["rows"], shape["batch_size"]) - done
    )
    epsilon, noise = settings.epsilon, settings.noise_multiplier
    budget = epsilon
    if epsilon is None and not is_resumed:  # a resumed run does what was planned
        budget = known.budget(dataset)
    is_used_up = budget is not None and spent >= USED_UP * budget
    if is_used_up and settings.extend_budget:
        epsilon, noise, is_used_up = None, noise or earlier[-1].noise_multiplier, False
    if requested and not is_used_up:
        steps = planning.plan(
            **shape,
            delta=delta,
            epsilon=epsilon,
            noise_multiplier=noise,
            earlier=earlier,
            done=done,
        )
    else:
        # The run does no step, and needs the public parameters all the same.
        steps = (
            earlier[-1] if earlier else planning.plan(**shape, delta=delta, noise_multiplier=1.0)
        )
        steps = steps._replace(count=0)
    if epsilon is None and not settings.extend_budget:
        if budget is None:
            budget = accounting.epsilon([*earlier, steps], delta)
        steps = steps._replace(count=steps_within(budget, earlier, steps, delta))
    if steps.count == 0 < requested:
        if not is_resumed:
            raise ValueError(_used_up(spent, budget, delta))
        warnings.warn(
            f"{_used_up(spent, budget, delta)}. `fit` ends with the checkpoint's weights, "
            f"{requested} steps early",
            stacklevel=2,
        )
    run = Run(
        *steps[1:],
        clip_norm=settings.clip_norm,
        delta=delta,
        planned_steps=steps.count,
        unit=unit,
        dataset=dataset,
        package_version=__version__,
        mechanism=settings.mechanism,
        budget=None if settings.extend_budget or settings.epsilon is not None else budget,
    )
    return run, steps.count < requested


def _used_up(spent, budget, delta):
    return (
        f"The budget for these rows is used up: ε = {accounting.round_up(spent):g} of "
        f"{accounting.round_up(budget):g} at δ = {delta:g}. `DPSGD(extend_budget=True)` continues "
        "and reports the larger ε; `keras-vaultgemma ledger` lists the runs on this machine"
    )


def steps_within(limit, earlier, steps, delta):
    """Return how many of some steps stay within a limit on ε."""
    fits, does_not = 0, steps.count + 1
    while does_not - fits > 1:
        # All of them first, because they usually fit.
        count = steps.count if does_not > steps.count else (fits + does_not) // 2
        found = accounting.epsilon([*earlier, steps._replace(count=count)], delta)
        # Versions of the package differ by rounding errors in the ε of the same steps.
        within = found <= limit * (1 + 1e-6)
        fits, does_not = (count, does_not) if within else (fits, count)
    return fits
