"""Private training inside Keras's `fit`: from the user's data to steps that are drawn, noised, counted and ended."""

import contextlib
import warnings
from pathlib import Path

import keras
from keras import ops

import keras_vaultgemma
from keras_vaultgemma import backend, checkpointing
from keras_vaultgemma.privacy import accounting, fingerprint, mechanism, refusals
from keras_vaultgemma.privacy import ledger as ledgers
from keras_vaultgemma.privacy import plan as planning
from keras_vaultgemma.privacy.private_batches import PrivateBatches, as_rows
from keras_vaultgemma.privacy.record import PrivacyRecord

DEFAULT_BATCH_SIZE = 32
"""Keras's."""

USED_UP = 0.99
"""Part of a budget after which nothing more is begun: noise for the rest would drown every gradient."""


class PrivateTraining:
    """The part of a `keras.Model` that trains privately, once it is compiled with `privacy=DPSGD(...)`.

    Stands before Keras's class among the bases. Without `privacy` everything is Keras's own.

    A model may say how rows are computed faster than one by one (`rows_at_once`) and what their losses are
    (`private_losses`). As it is here, a row is a batch of its own with the compiled loss.
    """

    _dpsgd = None
    _microbatch = 1
    _unprotected = ()

    @property
    def privacy(self):
        """`PrivacyRecord` of the weights."""
        if not hasattr(self, "_privacy_record"):
            self._privacy_record = PrivacyRecord()
        return self._privacy_record

    def compile(self, *args, privacy=None, **kwargs):
        """As `keras.Model.compile`.

        Args:
            privacy: `DPSGD`, which states the guarantee, or None to train as ever.

        Raises:
            ValueError: for an optimizer, layer or metric that private training refuses.
        """
        if not self._unprotected:
            names = ("loss", "clipped_share", "not_finite_rows")
            self._unprotected = [keras.metrics.Mean(name=refusals.UNPROTECTED + name) for name in names]
        super().compile(*args, **kwargs)
        if privacy is not None:
            refusals.check_model(self, (kwargs.get("metrics"), kwargs.get("weighted_metrics")))
        self._dpsgd = privacy

    @property
    def metrics(self):
        own = {id(metric) for metric in self._unprotected}
        return [metric for metric in super().metrics if self._dpsgd or id(metric) not in own]

    def get_metrics_result(self):
        own = {metric.name for metric in self._unprotected}
        return {name: value for name, value in super().get_metrics_result().items() if name not in own}

    def fit(self, x=None, y=None, **arguments):
        """As `keras.Model.fit`; in private training `batch_size` is the expected one.

        Raises:
            ValueError: for data and arguments that private training refuses, or a budget that is used up.
        """
        arguments |= {"x": x, "y": y}
        with private(self, arguments) as arguments, checkpointing.resumable(self, arguments) as arguments:
            return super().fit(**arguments)

    def train_on_batch(self, *args, **kwargs):
        if self._dpsgd:
            raise ValueError("Private training draws its batches itself, in `fit`. Received: a batch to train on")
        return super().train_on_batch(*args, **kwargs)

    def train_step(self, *args, **kwargs):
        if not self._dpsgd:
            return super().train_step(*args, **kwargs)
        return backend.train_step(self, self._private_step, *args)

    def rows_at_once(self, rows):
        """How many rows pay off to be computed together, each with a copy of the trainable variables of its own.

        More than 1 needs layers that take variables with a first axis for the rows; `private_losses` is then called
        with such variables, of [R, *shape].

        Args:
            rows: training data, nested arrays.
        """
        return 1

    def private_losses(self, x, y=None, sample_weight=None):
        """The losses of some rows.

        Args:
            x, y, sample_weight: R rows; R is 1 unless `rows_at_once` says otherwise.

        Returns:
            `(total, losses)`, float32 scalar and [R]. Each row's part of the total is a function of the row alone.
        """
        predicted = self(x, training=True)
        total = ops.cast(self.compute_loss(x, y, predicted, sample_weight, training=True), "float32")
        self.compute_metrics(x, y, predicted, sample_weight)
        return total, ops.reshape(total, (1,))

    def private_unit(self, rows, unit):
        """What is protected, in words."""
        return f"one {unit}"

    def _private_step(self, data):
        x, y, step = data
        inputs = (x, y, step["sample_weight"]) if "sample_weight" in step else (x, y)
        clipped, states = self._clipped_sum(inputs, step["count"][0])
        for variable, value in zip(self._states, states, strict=True):
            variable.assign(value)
        multiplier, expected = step["noise_multiplier"][0], step["expected_rows"][0]
        gradients = mechanism.noised_mean(clipped, multiplier, step["noise_seeds"], expected)
        self.optimizer.apply(gradients, self.trainable_variables)
        count = ops.cast(step["count"][0], "float32")
        used = count - clipped.not_finite
        loss, share, not_finite = self._unprotected
        loss.update_state(clipped.loss / ops.maximum(used, 1.0), used)
        share.update_state(clipped.clipped / ops.maximum(used, 1.0), used)
        not_finite.update_state(clipped.not_finite)
        told = super().get_metrics_result().items()
        return {name: value for name, value in told if name.startswith(refusals.UNPROTECTED)}

    @property
    def _states(self):
        """Variables that computing a row may change: seeds of random layers, and metrics."""
        weights, own = {id(v) for v in self.weights}, {id(v) for m in self._unprotected for v in m.variables}
        seeds = [v for v in self.non_trainable_variables if id(v) not in weights]
        return seeds + [v for v in self.metrics_variables if id(v) not in own]

    def _clipped_sum(self, inputs, count):
        """`mechanism.clipped_sum` of rows, and the values of `_states` after it."""
        size, trained, states = self._microbatch, self.trainable_variables, self._states
        now = [(v, backend.value_of(v)) for v in [*self.variables, *self.metrics_variables]]
        values = [backend.value_of(v) for v in trained]
        # Each row is computed with a copy of its own, whose gradient is the row's alone.
        copies = values if size == 1 else [ops.broadcast_to(x[None], (size, *x.shape)) for x in values]

        def row_gradients(start, before):
            def part(x):
                return ops.slice(x, (start, *[0] * (len(x.shape) - 1)), (size, *x.shape[1:]))

            rows = keras.tree.map_structure(part, inputs)

            def losses_of(copies):
                with keras.StatelessScope(state_mapping=now) as scope:
                    # Not in the mapping, which takes values of the variables' own shapes alone.
                    for variable, value in [*zip(trained, copies, strict=True), *zip(states, before, strict=True)]:
                        scope.add_update((variable, value))
                    others = [v for v, _ in now if not any(v is state for state in states)]
                    fixed = [scope.get_current_value(v) for v in others]
                    total, losses = self.private_losses(*rows)
                    for variable, value in zip(others, fixed, strict=True):
                        if scope.get_current_value(variable) is not value:
                            raise ValueError(
                                "Private training needs layers that remember nothing of the rows. Received: "
                                f"{variable.path}, which the model changes while it computes"
                            )
                    return total, (losses, [scope.get_current_value(v) for v in states])

            gradients, (losses, after) = backend.gradients(losses_of, copies)
            return [g if size > 1 else g[None] for g in gradients], losses, after

        start, shapes = [backend.value_of(v) for v in states], [tuple(v.shape) for v in trained]
        return mechanism.clipped_sum(row_gradients, shapes, count, size, self._dpsgd.clip_norm, start)


@contextlib.contextmanager
def private(model, arguments, records=None):
    """Arguments for `keras.Model.fit` with which a model that was compiled with `DPSGD` is trained privately.

    Args:
        model: compiled model with `PrivateTraining` among its bases.
        arguments: dict of arguments of `keras.Model.fit`; used unchanged where there is no `DPSGD`.
        records: list of str or bytes, the rows as they were before any preprocessing, by which they are known again;
            the rows of the arrays themselves if None.

    Raises:
        ValueError: for data or arguments that private training refuses, or a budget that is used up.
        OSError: where the ledger cannot be written.
    """
    settings, record = model._dpsgd, model.privacy
    if settings is None:
        yield arguments
        return
    arguments = {"epochs": 1, "initial_epoch": 0, **arguments}
    refusals.check_fit(arguments, settings.public_validation)
    rows = as_rows(*(arguments.pop(name, None) for name in ("x", "y", "sample_weight")))
    refusals.check_rows(rows, settings.unit)
    refusals.check_losses(model, rows)
    arrays = keras.tree.flatten(rows)
    count, batch_size = len(arrays[0]), arguments.pop("batch_size", None) or DEFAULT_BATCH_SIZE
    per_epoch = planning.steps_per_epoch(count, batch_size)
    # At most a quarter of a batch, for the last microbatch of a step is rarely full.
    microbatch = settings.microbatch_size or min(model.rows_at_once(rows), max(1, batch_size // 4))
    path = _ledger_path(settings, arguments)
    if path is not None and path.exists():
        record.add(ledgers.read(path))
    if records is None:
        records = (b"".join(array[i].tobytes() for array in arrays) for i in range(count))
    done = _steps_done(arguments, per_epoch)
    run, is_cut_short = _plan(
        record,
        settings,
        fingerprint.fingerprint(records, fingerprint.key()),
        model.private_unit(rows, settings.unit),
        dict(rows=count, batch_size=batch_size, epochs=arguments["epochs"], microbatch=microbatch),
        done,
    )
    _prepare(model, rows, microbatch)
    arguments |= {
        "x": PrivateBatches(
            rows,
            run.steps(0),
            arguments["epochs"] * per_epoch,
            len(model.trainable_variables),
            microbatch,
            settings.secret(),
            int(ops.convert_to_numpy(model.optimizer.iterations)),
        ),
        "shuffle": False,
        "steps_per_epoch": per_epoch,
        "callbacks": [
            _Counting(record, is_cut_short, per_epoch, done),
            *keras.tree.flatten(arguments.get("callbacks") or []),
        ],
    }
    record.begin(ledgers.OpenRun(path, run, record.ledger))
    try:
        yield arguments
    finally:
        record.end()


def _plan(record, settings, dataset, unit, shape, done):
    """`(ledger.Run, whether it ends before the steps that were asked for)`."""
    delta = planning.default_delta(shape["rows"]) if settings.delta is None else settings.delta
    earlier = record.ledger.on(dataset)
    spent = accounting.epsilon(earlier, delta) if earlier else 0.0
    epsilon, noise = settings.epsilon, settings.noise_multiplier
    budget = record.budgets.get(dataset) if epsilon is None else epsilon
    if budget is not None and spent >= USED_UP * budget:
        if not settings.extend_budget:
            raise ValueError(_used_up(spent, budget, delta))
        epsilon, noise = None, noise or earlier[-1].noise_multiplier
    asked = shape["epochs"] * planning.steps_per_epoch(shape["rows"], shape["batch_size"]) - done
    if asked > 0:
        steps = planning.plan(**shape, delta=delta, epsilon=epsilon, noise_multiplier=noise, earlier=earlier, done=done)
    else:
        # All is done, and the run releases nothing; it needs a shape all the same.
        steps = earlier[-1] if earlier else planning.plan(**shape, delta=delta, noise_multiplier=1.0)
        steps = steps._replace(count=0)
    if epsilon is None and not settings.extend_budget:
        limit = record.budgets.setdefault(dataset, accounting.epsilon([*earlier, steps], delta))
        steps = steps._replace(count=_steps_within(limit, earlier, steps, delta))
        if steps.count == 0 < asked:
            raise ValueError(_used_up(spent, limit, delta))
    run = ledgers.Run(
        *steps[1:],
        clip_norm=settings.clip_norm,
        delta=delta,
        planned_steps=steps.count,
        unit=unit,
        dataset=dataset,
        package_version=keras_vaultgemma.__version__,
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
    checkpoint = checkpointing.checkpoint_of(arguments)
    return checkpoint and checkpoint.path.with_name(ledgers.FILE)


def _steps_done(arguments, per_epoch):
    """Steps before the one that `fit` begins with."""
    checkpoint, epoch, batch = checkpointing.checkpoint_of(arguments), arguments["initial_epoch"], 0
    if checkpoint and (position := checkpoint.position):
        epoch, batch = position["epoch"], position["batch"]
        if position["is_finished"]:
            epoch, batch = arguments["epochs"], 0
    return epoch * per_epoch + batch


def _prepare(model, rows, microbatch):
    """Make what Keras would make of the first batch, whose structure is another one here."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    if microbatch != model._microbatch:
        model._microbatch, model.train_function = microbatch, None  # it stands in the compiled step
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
    """

    def __init__(self, record, is_cut_short, per_epoch, done):
        super().__init__()
        self._record, self._is_cut_short, self._per_epoch, self._done = record, is_cut_short, per_epoch, done

    def on_epoch_begin(self, epoch, logs=None):
        first, before = divmod(self._done, self._per_epoch)
        self._left = self._per_epoch - (before if epoch == first else 0)

    def on_train_batch_begin(self, batch, logs=None):
        if batch >= self._left:
            # An epoch that is resumed has fewer steps than Keras thinks, and none may be done that is not counted.
            raise StopIteration
        self._record.run.release()

    def on_train_batch_end(self, batch, logs=None):
        run = self._record.run
        if self._is_cut_short and run.done >= run.run.planned_steps:
            warnings.warn(
                f"The budget for these rows ends after {run.done} more steps, and so does `fit`", stacklevel=2
            )
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs["epsilon"] = self._record.spent().epsilon
