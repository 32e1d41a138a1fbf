"""One private call of `fit`: its checks, plan, batches and ledger, and where it ends."""

import contextlib
import warnings
from pathlib import Path

import keras

from keras_vaultgemma._version import __version__
from keras_vaultgemma.privacy import accounting, checks, fingerprint, planning
from keras_vaultgemma.privacy.counting import COUNTING, counting_callback, iterations
from keras_vaultgemma.privacy.ledger import FILE, Run, read_ledger
from keras_vaultgemma.privacy.ledger_writer import OpenRun
from keras_vaultgemma.privacy.sampling import PrivateBatches, as_rows
from keras_vaultgemma.training.checkpoint import all_callbacks, checkpoint_of
from keras_vaultgemma.training.state import read_state_metadata

DEFAULT_BATCH_SIZE = 32
"""Default batch size of `keras.Model.fit`."""

USED_UP = 0.99
"""Fraction of a budget after which no further run begins, because the noise that the rest allows
would drown every gradient."""


@contextlib.contextmanager
def plain_fit(model, arguments):
    """Context of a `fit` without privacy, which counts its steps in the model's record.

    Args:
        model: compiled `keras.Model` with a `privacy` record.
        arguments: dict of arguments of `keras.Model.fit`.

    Yields:
        The arguments, unchanged.
    """
    before = iterations(model)
    with model.privacy.count_plain_steps(lambda: iterations(model) - before):
        yield arguments


@contextlib.contextmanager
def private_fit(training, arguments, records=None):
    """Context of a private `fit`: its ledger is open inside.

    Args:
        training: `PrivateTraining` of the model.
        arguments: dict of arguments of `keras.Model.fit`.
        records: list of strings or bytes: the training examples before any preprocessing, by which
            a dataset is recognised. Defaults to the rows of the arrays.

    Yields:
        Arguments of `keras.Model.fit` with which the model is trained privately.

    Raises:
        ValueError: If private training does not support the data or an argument, the budget is used
            up, the ledger lacks steps that the checkpoint's weights come from, or another run is
            writing the ledger.
        OSError: If the ledger cannot be written.
    """
    model, settings, record = training.model, training.settings, training.model.privacy
    arguments = {"epochs": 1, "initial_epoch": 0, **arguments}
    checks.check_fit(arguments, settings.public_validation)
    checks.check_model(model, training.compiled_metrics)
    checks.check_execution(model)
    rows = as_rows(*(arguments.pop(name, None) for name in ("x", "y", "sample_weight")))
    checks.check_rows(rows, settings.unit)
    checks.check_losses(model, rows)
    count = len(keras.tree.flatten(rows)[0])
    batch_size = arguments.pop("batch_size", None) or DEFAULT_BATCH_SIZE
    per_epoch = planning.steps_per_epoch(count, batch_size)
    microbatch = _microbatch(training, rows, batch_size)

    path = _ledger_path(settings, arguments)
    if path is not None and path.exists():
        record.add(read_ledger(path))
    saved = _checkpoint_facts(arguments)
    _check_ledger(record.ledger, path, saved)
    done = _steps_done(arguments, per_epoch, saved)
    if records is None:
        records = fingerprint.rows_of(keras.tree.flatten(rows[:2]))  # without the weights
    dataset = fingerprint.fingerprint(records, fingerprint.key())
    run, is_cut_short = _plan(
        record,
        settings,
        dataset,
        training.row_losses.unit(rows, settings.unit),
        dict(rows=count, batch_size=batch_size, epochs=arguments["epochs"], microbatch=microbatch),
        done,
        is_resumed=bool(saved and done),
    )

    arguments["x"] = batches = PrivateBatches(
        rows,
        run.steps(0),
        arguments["epochs"] * per_epoch,
        len(model.trainable_variables),
        microbatch,
        settings.secret(),
        iterations(model),
        dataset,
        len(training.seeds),
    )
    training.prepare(rows, microbatch, batches.capacity)
    if is_cut_short and not run.planned_steps:
        # A resumed run that does no step ends where it begins.
        arguments["epochs"] = saved["position"]["epoch"]
    counting = counting_callback(record, is_cut_short, per_epoch, done)
    arguments |= {
        "shuffle": False,
        "steps_per_epoch": per_epoch,
        "callbacks": [
            counting,
            *all_callbacks(arguments),
        ],
    }
    opened = OpenRun(path, run, record.everything)
    if {*opened.ledger.runs[:-1]} != {*record.ledger.runs}:
        opened.close()
        raise ValueError(
            f"{path} must have one writer. Received: a run that began while this one was planned"
        )
    record.begin(opened)
    try:
        yield arguments
        _check_updates(opened, counting.updates())
    finally:
        record.end()


def _check_updates(run, updates):
    """Raise RuntimeError if there were more updates than a run counts, and count them."""
    counted = run.done
    for _ in range(updates - counted):
        run.release()
    if updates > counted:
        raise RuntimeError(
            "Private training needs one update of the weights in each step. "
            f"Received: {updates} updates in {counted} steps. They count in the ledger, but some "
            "were done before they were written there"
        )


def _microbatch(training, rows, batch_size):
    """Return how many rows are computed together."""
    size, losses = training.settings.microbatch_size, training.row_losses
    checks.check_microbatch(size, losses.takes_row_variables)
    if size is not None:
        return size
    if not losses.takes_row_variables:
        return 1
    # At most a quarter of a batch, because the last microbatch of a step is rarely full.
    return min(losses.rows_at_once(rows), max(1, batch_size // 4))


def _plan(record, settings, dataset, unit, shape, done, is_resumed):
    """Return a `Run` and True if it ends before the requested number of steps."""
    delta = planning.default_delta(shape["rows"]) if settings.delta is None else settings.delta
    planning.warn_of_large_delta(shape["rows"], delta)
    earlier = record.ledger.on(dataset)
    spent = accounting.epsilon(earlier, delta) if earlier else 0.0
    requested = max(
        0, shape["epochs"] * planning.steps_per_epoch(shape["rows"], shape["batch_size"]) - done
    )
    epsilon, noise = settings.epsilon, settings.noise_multiplier
    budget = epsilon
    if epsilon is None and not is_resumed:  # a resumed run does what was planned
        budget = record.ledger.budget(dataset)
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
        steps = steps._replace(count=_steps_within(budget, earlier, steps, delta))
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
        "and reports the larger ε"
    )


def _steps_within(limit, earlier, steps, delta):
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


def _ledger_path(settings, arguments):
    if settings.ledger is not None:
        return Path(settings.ledger)
    checkpoint = checkpoint_of(arguments)
    return checkpoint and checkpoint.path.with_name(FILE)


def _checkpoint_facts(arguments):
    """Return the facts of the checkpoint that `fit` resumes from, or None."""
    checkpoint = checkpoint_of(arguments)
    return read_state_metadata(checkpoint.path) if checkpoint and checkpoint.path.exists() else None


def _check_ledger(ledger, path, saved):
    """Raise ValueError if a ledger lacks a step that a checkpoint's weights come from."""
    callbacks = saved["memories"] if saved else {}
    expected = callbacks.get(COUNTING, {}).get("counted", {})
    counts = {run.name: count for run, count in ledger.runs}
    if any(count > counts.get(name, 0) for name, count in expected.items()):
        found = sum(min(count, counts.get(name, 0)) for name, count in expected.items())
        raise ValueError(
            f"{path} must count all {sum(expected.values())} private steps that the checkpoint's "
            f"weights come from. Received: {found} of them. Put the ledger that was written with "
            "the checkpoint there, or give this run another folder"
        )


def _steps_done(arguments, per_epoch, saved):
    """Return how many steps precede the first one of this `fit`."""
    epoch, batch = arguments["initial_epoch"], 0
    if saved:
        position = saved["position"]
        epoch, batch = position["epoch"], position["batch"]
        if position["is_finished"]:
            epoch, batch = arguments["epochs"], 0
    return epoch * per_epoch + batch
