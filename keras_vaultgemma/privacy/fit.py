"""One private call of `fit`: what it is allowed, which batches it gets, what is written down, and where it ends."""

import contextlib
import warnings
from pathlib import Path

import keras
from keras import ops

from keras_vaultgemma._version import __version__
from keras_vaultgemma.privacy import accounting, checks, fingerprint, planning
from keras_vaultgemma.privacy.ledger import FILE, Run, read_ledger
from keras_vaultgemma.privacy.ledger_writer import OpenRun
from keras_vaultgemma.privacy.sampling import PrivateBatches, as_rows
from keras_vaultgemma.training.checkpoint import checkpoint_of
from keras_vaultgemma.training.state import read_state_facts

DEFAULT_BATCH_SIZE = 32
"""Keras's."""

USED_UP = 0.99
"""Part of a budget after which nothing more is begun: noise for the rest would drown every gradient."""


@contextlib.contextmanager
def private_fit(model, arguments, records=None):
    """Arguments for `keras.Model.fit` with which a model that was compiled with `DPSGD` is trained privately.

    Args:
        model: compiled model with `PrivateTraining` among its bases.
        arguments: dict of arguments of `keras.Model.fit`; used unchanged where there is no `DPSGD`.
        records: list of str or bytes, the rows as they were before any preprocessing, by which they are known again;
            the rows of the arrays themselves if None.

    Raises:
        ValueError: for data or arguments that private training refuses, a budget that is used up, or a ledger that
            lacks steps of the checkpoint's weights or that another run writes.
        OSError: where the ledger cannot be written.
    """
    settings, record = model._dpsgd, model.privacy
    if settings is None:
        before = _iterations(model)
        try:
            yield arguments
        finally:
            record.add_plain_steps(_iterations(model) - before)
        return
    arguments = {"epochs": 1, "initial_epoch": 0, **arguments}
    checks.check_fit(arguments, settings.public_validation)
    checks.check_execution(model)
    rows = as_rows(*(arguments.pop(name, None) for name in ("x", "y", "sample_weight")))
    checks.check_rows(rows, settings.unit)
    checks.check_losses(model, rows)
    arrays = keras.tree.flatten(rows)
    count, batch_size = len(arrays[0]), arguments.pop("batch_size", None) or DEFAULT_BATCH_SIZE
    per_epoch = planning.steps_per_epoch(count, batch_size)
    checks.check_microbatch(model, settings.microbatch_size)
    # At most a quarter of a batch, for the last microbatch of a step is rarely full.
    at_once = (
        min(model.rows_at_once(rows), max(1, batch_size // 4)) if model.takes_row_variables else 1
    )
    microbatch = settings.microbatch_size or at_once
    path = _ledger_path(settings, arguments)
    if path is not None and path.exists():
        record.add(read_ledger(path))
    if records is None:
        records = fingerprint.rows_of(keras.tree.flatten(rows[:2]))  # without the weights
    saved = _checkpoint_facts(arguments)
    _check_ledger(record.ledger, path, saved)
    done = _steps_done(arguments, per_epoch, saved)
    dataset = fingerprint.fingerprint(records, fingerprint.key())
    run, is_cut_short = _plan(
        record,
        settings,
        dataset,
        model.private_unit(rows, settings.unit),
        dict(rows=count, batch_size=batch_size, epochs=arguments["epochs"], microbatch=microbatch),
        done,
        is_resumed=bool(saved and done),
    )
    _prepare(model, rows, microbatch)
    arguments["x"] = PrivateBatches(
        rows,
        run.steps(0),
        arguments["epochs"] * per_epoch,
        len(model.trainable_variables),
        microbatch,
        settings.secret(),
        _iterations(model),
        dataset,
        len(model._seeds),
    )
    if is_cut_short and not run.planned_steps:
        arguments["epochs"] = saved["position"][
            "epoch"
        ]  # where a resumed run begins: it does no step
    arguments |= {
        "shuffle": False,
        "steps_per_epoch": per_epoch,
        "callbacks": [
            _Counting(record, is_cut_short, per_epoch, done),
            *keras.tree.flatten(arguments.get("callbacks") or []),
        ],
    }
    opened = OpenRun(path, run, record.history)
    if {*opened.ledger.runs[:-1]} != {*record.ledger.runs}:
        opened.close()
        raise ValueError(
            f"{path} must have one writer. Received: a run that began while this one was planned"
        )
    record.begin(opened)
    try:
        yield arguments
    finally:
        record.end()


def _plan(record, settings, dataset, unit, shape, done, is_resumed):
    """`(ledger.Run, whether it ends before the steps that were asked for)`."""
    delta = planning.default_delta(shape["rows"]) if settings.delta is None else settings.delta
    earlier = record.ledger.on(dataset)
    spent = accounting.epsilon(earlier, delta) if earlier else 0.0
    asked = max(
        0, shape["epochs"] * planning.steps_per_epoch(shape["rows"], shape["batch_size"]) - done
    )
    epsilon, noise = settings.epsilon, settings.noise_multiplier
    budget = record.budgets.get(dataset) if epsilon is None else epsilon
    is_used_up = budget is not None and spent >= USED_UP * budget
    if is_used_up and settings.extend_budget:
        epsilon, noise, is_used_up = None, noise or earlier[-1].noise_multiplier, False
    if asked and not is_used_up:
        steps = planning.plan(
            **shape,
            delta=delta,
            epsilon=epsilon,
            noise_multiplier=noise,
            earlier=earlier,
            done=done,
        )
    else:
        # The run releases nothing; it needs a shape all the same.
        steps = (
            earlier[-1] if earlier else planning.plan(**shape, delta=delta, noise_multiplier=1.0)
        )
        steps = steps._replace(count=0)
    if epsilon is None and not settings.extend_budget:
        budget = record.budgets.setdefault(dataset, accounting.epsilon([*earlier, steps], delta))
        steps = steps._replace(count=_steps_within(budget, earlier, steps, delta))
    if steps.count == 0 < asked:
        if not is_resumed:
            raise ValueError(_used_up(spent, budget, delta))
        warnings.warn(
            f"{_used_up(spent, budget, delta)}. `fit` ends with the checkpoint's weights, {asked} steps early",
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
    )
    return run, steps.count < asked


def _used_up(spent, budget, delta):
    return (
        f"The budget for these rows is used up: ε = {accounting.round_up(spent):g} of {accounting.round_up(budget):g} "
        f"at δ = {delta:g}. `DPSGD(extend_budget=True)` goes on and tells the larger ε"
    )


def _steps_within(limit, earlier, steps, delta):
    """How many of some steps keep to a limit on ε."""
    fits, does_not = 0, steps.count + 1
    while does_not - fits > 1:
        # All of them first, since that is what mostly fits.
        count = steps.count if does_not > steps.count else (fits + does_not) // 2
        within = accounting.epsilon([*earlier, steps._replace(count=count)], delta) <= limit
        fits, does_not = (count, does_not) if within else (fits, count)
    return fits


def _ledger_path(settings, arguments):
    if settings.ledger is not None:
        return Path(settings.ledger)
    checkpoint = checkpoint_of(arguments)
    return checkpoint and checkpoint.path.with_name(FILE)


def _checkpoint_facts(arguments):
    """The facts of the checkpoint that `fit` goes on from, or None."""
    checkpoint = checkpoint_of(arguments)
    return read_state_facts(checkpoint.path) if checkpoint and checkpoint.path.exists() else None


def _check_ledger(ledger, path, saved):
    """Raise ValueError where a ledger lacks a step that is in a checkpoint's weights."""
    kept = saved["memories"].get(f"{_Counting.__name__} 0", {}).get("counted", {}) if saved else {}
    counts = {run.name: count for run, count in ledger.runs}
    if any(count > counts.get(name, 0) for name, count in kept.items()):
        found = sum(min(count, counts.get(name, 0)) for name, count in kept.items())
        raise ValueError(
            f"{path} must count all {sum(kept.values())} private steps that the checkpoint's weights come from. "
            f"Received: {found} of them. Put the ledger that was written with the checkpoint there, or give this run "
            "another folder"
        )


def _iterations(model):
    """Steps that a model's optimizer has done."""
    return int(ops.convert_to_numpy(model.optimizer.iterations)) if model.optimizer else 0


def _steps_done(arguments, per_epoch, saved):
    """Steps before the one that `fit` begins with."""
    epoch, batch = arguments["initial_epoch"], 0
    if saved:
        position = saved["position"]
        epoch, batch = position["epoch"], position["batch"]
        if position["is_finished"]:
            epoch, batch = arguments["epochs"], 0
    return epoch * per_epoch + batch


def _prepare(model, rows, microbatch):
    """Make what Keras would make of the first batch, whose structure is another one here."""
    shapes = [array.shape[1:] for array in keras.tree.flatten(rows)]
    if (microbatch, shapes) != (model._microbatch, model._row_shapes):
        # The compiled step has them; TensorFlow, asked for another shape, would go on with an unknown one.
        model._microbatch, model._row_shapes, model.train_function = microbatch, shapes, None
    x, y, *weight = keras.tree.map_structure(lambda array: ops.convert_to_tensor(array[:1]), rows)
    if model.loss is None:  # nor are there metrics that would read what was predicted
        model.compute_metrics(x, y, y, *weight)
    else:
        predicted = model(x)
        model.compute_loss(x, y, predicted, *weight)
        model.compute_metrics(x, y, predicted, *weight)
    model.reset_metrics()


class _Counting(keras.callbacks.Callback):
    """Writes each step into the ledger before it is done, and ends `fit` where the budget ends.

    Args:
        record: `PrivacyRecord` with an open run.
        is_cut_short: whether the run ends before `fit` would.
        per_epoch: steps of an epoch.
        done: steps before the first.

    Attributes:
        counted: {name: steps} of the runs that the weights come from.
        kept: what a `TrainingCheckpoint` saves of it.
    """

    kept = ("counted",)

    def __init__(self, record, is_cut_short, per_epoch, done):
        super().__init__()
        self.counted = {}
        self._record, self._is_cut_short, self._per_epoch, self._done = (
            record,
            is_cut_short,
            per_epoch,
            done,
        )

    def on_epoch_begin(self, epoch, logs=None):
        first, before = divmod(self._done, self._per_epoch)
        self._left = self._per_epoch - (before if epoch == first else 0)

    def on_train_batch_begin(self, batch, logs=None):
        if batch >= self._left:
            # An epoch that is resumed has fewer steps than Keras thinks, and none may be done that is not counted.
            raise StopIteration
        self._record.run.release()
        self.counted = {run.name: count for run, count in self._record.ledger.runs}

    def on_train_batch_end(self, batch, logs=None):
        run = self._record.run
        if self._is_cut_short and run.done >= run.run.planned_steps:
            warnings.warn(
                f"The budget for these rows ends after {run.done} more steps, and so does `fit`",
                stacklevel=2,
            )
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs["epsilon"] = self._record.spent().epsilon
