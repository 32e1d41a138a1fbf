"""One private call of `fit`: its checks, plan, batches and ledger, and where it ends."""

import contextlib
import warnings
from pathlib import Path

import keras

from keras_vaultgemma import backend
from keras_vaultgemma.privacy import checks, fingerprint, machine_ledger, planning
from keras_vaultgemma.privacy.budget import plan_run
from keras_vaultgemma.privacy.counting import COUNTING, counting_callback, iterations
from keras_vaultgemma.privacy.groups import Groups, group_labels
from keras_vaultgemma.privacy.ledger import FILE, read_ledger
from keras_vaultgemma.privacy.ledger_writer import OpenRun
from keras_vaultgemma.privacy.processes import begin_together
from keras_vaultgemma.privacy.sampling import PrivateBatches, as_rows
from keras_vaultgemma.training.checkpoint import all_callbacks, checkpoint_of
from keras_vaultgemma.training.state import read_state_metadata

DEFAULT_BATCH_SIZE = 32
"""Default batch size of `keras.Model.fit`."""


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
    arguments, run, counting = _begin(training, arguments, records)
    record = training.model.privacy
    record.begin(run)
    try:
        yield arguments
        _check_updates(run, counting.updates())
    finally:
        record.end()


def _begin(training, arguments, records):
    """Return the arguments of `keras.Model.fit`, the `OpenRun` and the callback that counts."""
    model, settings, record = training.model, training.settings, training.model.privacy
    arguments = {"epochs": 1, "initial_epoch": 0, **arguments}
    checks.check_fit(arguments, settings.public_validation)
    checks.check_model(model, training.compiled_metrics)
    checks.check_execution(model)
    checks.check_distribution(arguments, training.compiled_metrics)
    groups = arguments.pop("groups", None)
    checks.check_groups(groups, settings.unit)
    rows = as_rows(*(arguments.pop(name, None) for name in ("x", "y", "sample_weight")))
    checks.check_rows(rows, settings.unit)
    checks.check_losses(model, rows)
    count = len(keras.tree.flatten(rows)[0])
    batch_size = arguments.pop("batch_size", None) or DEFAULT_BATCH_SIZE
    unit = settings.unit
    if groups is not None:
        groups = Groups(group_labels(groups, count), settings.max_rows_per_group)
        count, unit = len(groups), f"user of at most {groups.max_rows} rows"
        checks.check_users(count, batch_size)
    per_epoch = planning.steps_per_epoch(count, batch_size)
    devices = backend.data_devices()
    microbatch = _microbatch(training, rows, batch_size // devices, groups is not None)
    shape = dict(rows=count, batch_size=batch_size, epochs=arguments["epochs"])
    unit = training.row_losses.unit(rows, unit)
    if records is None:
        records = fingerprint.rows_of(keras.tree.flatten(rows[:2]))  # without the weights
        records = records if groups is None else [*records]  # which are read twice
    saved = _checkpoint_facts(arguments)
    opened, facts = begin_together(
        lambda: _open_run(settings, record, arguments, records, unit, shape, saved),
        record,
        (rows, [] if groups is None else groups.sizes),
        shape,
    )
    with contextlib.ExitStack() as after_an_error:
        after_an_error.callback(opened.close)
        batches = PrivateBatches(
            rows,
            opened.run.steps(0),
            arguments["epochs"] * per_epoch,
            len(model.trainable_variables),
            bytes.fromhex(facts["secret"]),
            iterations(model),
            opened.run.dataset,
            len(training.seeds),
            groups,
            devices,
            backend.own_parts(),
        )
        if groups is not None:
            batches.run_identity["users"] = groups.fingerprint(records, fingerprint.key())
            batches.run_identity_comparisons["users"] = fingerprint.may_be_equal
        training.prepare(rows, microbatch, batches.largest, settings.max_rows_per_group)
        after_an_error.pop_all()
    is_cut_short, done = facts["is_cut_short"], facts["done"]
    if is_cut_short and not opened.run.planned_steps:
        # A resumed run that does no step ends where it begins.
        arguments["epochs"] = saved["position"]["epoch"]
    counting = counting_callback(record, is_cut_short, per_epoch, done)
    arguments |= {
        "x": batches,
        "shuffle": False,
        "steps_per_epoch": per_epoch,
        "callbacks": [
            counting,
            *all_callbacks(arguments),
        ],
    }
    return arguments, opened, counting


def _open_run(settings, record, arguments, records, unit, shape, saved):
    """Return the `OpenRun`, planned and written to the ledgers, and a dict of its other facts."""
    path = _ledger_path(settings, arguments)
    if path is not None and path.exists():
        record.add(read_ledger(path))
    _check_ledger(record.ledger, path, saved)
    done = _steps_done(
        arguments, planning.steps_per_epoch(shape["rows"], shape["batch_size"]), saved
    )
    sketch = fingerprint.RowSketch(key := fingerprint.key())
    dataset = fingerprint.fingerprint(sketch.watch(records), key)
    # A budget holds for all that is learned from these data; without one, other models go on.
    has_budget = settings.epsilon is not None and settings.seed_for_tests is None
    known = record.known() if has_budget else record.ledger
    run, is_cut_short = plan_run(
        known, settings, dataset, unit, shape, done, is_resumed=bool(saved and done)
    )
    secret, sketched = settings.secret(), None
    if settings.seed_for_tests is None:
        sketched = sketch.values()
        _warn_of_common_rows(record.ledger, run, sketched)
    opened = OpenRun(path, run, record.everything, sketched)
    is_overtaken = has_budget and len(record.known().on(dataset)) > len(known.on(dataset)) + 1
    if {*opened.ledger.runs[:-1]} != {*record.ledger.runs} or is_overtaken:
        opened.close()
        raise ValueError(
            f"{path or 'A budget'} must have one writer. Received: a run that began while this one "
            "was planned"
        )
    return opened, {"is_cut_short": is_cut_short, "done": done, "secret": secret.hex()}


def _warn_of_common_rows(ledger, run, sketched):
    """Warn if the guarantee of a run is not that of all runs on this machine with its records."""
    on_these_data = {one.name for one, _ in ledger.runs if one.dataset == run.dataset}
    found = [
        (one, count)
        for one, count in machine_ledger.in_common(
            sketched, run.dataset, machine_ledger.read_runs()
        )
        if one.run.name not in on_these_data and one.steps
    ]
    if found:
        earlier = machine_ledger.as_ledger([one for one, _ in found])
        steps = [*machine_ledger.steps_of(earlier), *ledger.on(run.dataset)]
        steps.append(run.steps(run.planned_steps))
        warnings.warn(machine_ledger.describe_common(found, steps, run.delta), stacklevel=2)


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


def _microbatch(training, rows, batch_size, are_users):
    """Return how many rows or users are computed together."""
    size, losses = training.settings.microbatch_size, training.row_losses
    takes_several = losses.takes_user_variables if are_users else losses.takes_row_variables
    checks.check_microbatch(size, takes_several)
    if size is not None:
        return size
    if not takes_several:
        return 1
    rows_at_once = losses.rows_at_once(rows) // (training.settings.max_rows_per_group or 1)
    return backend.block_size(max(1, rows_at_once), batch_size)


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
