"""One call of `fit` that saves itself as it goes, and watches its loss."""

import operator
import warnings

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.privacy import fingerprint
from keras_vaultgemma.training.state import (
    GROUPS,
    assign_values,
    best_weight_arrays,
    callback_memories,
    copy_values,
    metric_variables,
    model_signature,
    read_state_arrays,
    restore_callbacks,
    state_nbytes,
    state_variables,
    weights_are_finite,
    write_state,
)

COPY_LIMIT = 2**26
"""Bytes of state up to which the last good one is copied at each step. LoRA of rank 8 on the 1B model has 16 MB."""


class CheckpointedRun(keras.callbacks.Callback):
    """One call of `fit` with a `TrainingCheckpoint`.

    Args:
        checkpoint: `TrainingCheckpoint`.
        model: compiled model, its optimizer built.
        batches: `Batches` to train on.
        callbacks: the other callbacks of this `fit`.
        saved: facts of the checkpoint's file, or None for a new run.
        initial_epoch: of a new run.

    Attributes:
        start: where training starts: {"epoch", "batch", both from 0, "is_finished"}.
    """

    def __init__(self, checkpoint, model, batches, callbacks, saved, initial_epoch):
        super().__init__()
        self._checkpoint, self._batches, self._callbacks, self._saved = (
            checkpoint,
            batches,
            callbacks,
            saved,
        )
        self._facts = {
            "seed": batches.seed,
            "data": batches.facts,
            "model": model_signature(model),
        }
        self.start = {"epoch": initial_epoch, "batch": 0, "is_finished": False}
        if saved:
            for name in ("data", "model"):
                _check_equal(checkpoint.path, name, saved[name], self._facts[name])
            self.start = saved["position"]
        self._position = self.start
        self._variables = state_variables(model)
        self._keeps_copy = state_nbytes(self._variables) <= COPY_LIMIT
        self._good, self._unsaved, self._epoch = None, 0, None

    def on_train_begin(self, logs=None):
        path = self._checkpoint.path
        if self._saved:
            self._restore_model()
            best = dict(read_state_arrays(path, "best"))
            restore_callbacks(self.model, self._callbacks, self._saved["memories"], best)
            if self.params.get("verbose"):
                print(f"{path}: going on after {_describe_position(self.start)}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.start)
        self._good = copy_values(self._variables) if self._keeps_copy else None

    def on_epoch_begin(self, epoch, logs=None):
        done = self.start["batch"] if epoch == self.start["epoch"] else 0
        self._epoch = epoch
        self._batches.start(epoch, done)
        if done:
            self._restore_metrics()

    def on_train_batch_begin(self, batch, logs=None):
        if batch >= len(self._batches):
            # The rest of an epoch is done. Keras would go on until data run out, and TensorFlow, while it finds out,
            # runs what of a step depends on no data: it counts the step, draws seeds, decays weights.
            raise StopIteration
        step = (self._batches.seed, self._epoch, self._batches.done + batch)
        backend.seed_global_generator(
            int(np.random.SeedSequence(step).generate_state(1, "uint64")[0])
        )
        self._first = batch

    def on_train_batch_end(self, batch, logs=None):
        # With `steps_per_execution` these are several, and the last of an epoch may be said to be beyond its end.
        self._last = min(batch, len(self._batches) - 1)
        self._unsaved += self._last + 1 - self._first
        loss = logs.get(
            "loss", 0.0
        )  # private training has none: a row without a finite loss has no part in it
        if not np.isfinite(loss):
            # The update before is known to be good where its weights were looked at.
            since = (
                " (by this batch, or by the update after the one before)"
                if self._batches_unseen()
                else ""
            )
            self._stop(f"the loss is {loss}{since}")
            return
        done = self._batches.done + self._last + 1
        is_due = (
            self._is_due() and done < self._batches.steps
        )  # after an epoch's last batch callbacks come first
        if self._keeps_copy or is_due:
            backend.update_variables(self.model)
        if self._keeps_copy:
            state = copy_values(self._variables)
            if not weights_are_finite(state):
                self._stop("it leaves weights that are not finite")
                return
            self._good = state
        if is_due:
            self._save({"epoch": self._epoch, "batch": done, "is_finished": False})

    def on_epoch_end(self, epoch, logs=None):
        if not self.model.stop_training and (
            self._checkpoint.save_freq == "epoch" or self._is_due()
        ):
            self._save({"epoch": epoch + 1, "batch": 0, "is_finished": False})

    def on_train_end(self, logs=None):
        # Nothing to save where nothing was left to train.
        if self._checkpoint.failure is None and self._epoch is not None:
            self._save(
                {"epoch": self._epoch + 1, "batch": 0, "is_finished": self.model.stop_training}
            )

    def _batches_unseen(self):
        """How many batches before the last one have left weights that nobody has looked at."""
        return 0 if self._keeps_copy else self._unsaved - (self._last + 1 - self._first)

    def _is_due(self):
        return self._checkpoint.save_freq != "epoch" and self._unsaved >= self._checkpoint.save_freq

    def _save(self, position):
        if not self._keeps_copy and not weights_are_finite(self._variables):
            unseen = self._batches_unseen()
            self._stop(
                f"it{f' or one of the {unseen} before' * bool(unseen)} leaves weights that are not finite"
            )
            return
        self._unsaved = 0
        try:
            self._write(position)
        except OSError as error:
            warnings.warn(
                f"No checkpoint could be saved after {_describe_position(position)}: {error}. Training goes on; the checkpoint "
                f"after {_describe_position(self._position)} stands",
                stacklevel=2,
            )

    def _write(self, position):
        values = {
            **self._variables,
            **metric_variables(self.model),
            **best_weight_arrays(self.model, self._callbacks),
        }
        facts = {
            **self._facts,
            "position": position,
            "memories": callback_memories(self._callbacks),
        }
        write_state(self._checkpoint.path, facts, values)
        self._position = position

    def _restore_model(self):
        arrays = read_state_arrays(self._checkpoint.path, *GROUPS)
        assign_values(self._variables, arrays)

    def _restore_metrics(self):
        metrics = dict(read_state_arrays(self._checkpoint.path, "metric"))
        if len(metrics) > len(self.model.metrics_variables):
            # TensorFlow makes the variables of some metrics when they are first used.
            self.model.test_on_batch(*keras.utils.unpack_x_y_sample_weight(self._batches[0]))
        variables = metric_variables(self.model)
        if metrics.keys() != variables.keys():
            raise ValueError(
                f"{self._checkpoint.path} is of another run: its model had {len(metrics)} variables of metrics. "
                f"Received: {len(variables)}. Compile with the same metrics, or give this run another folder"
            )
        assign_values(variables, metrics.items())

    def _stop(self, reason):
        backend.update_variables(self.model)
        if self._keeps_copy:
            assign_values(self._variables, self._good.items())
            state = "before it"
        else:
            self._restore_model()
            state = f"after {_describe_position(self._position)}, the last checkpoint"
        first, last = (self._batches.done + batch + 1 for batch in (self._first, self._last))
        batches = f"batch {last}" if first == last else f"batches {first} to {last}"
        items = [
            int(i)
            for batch in range(self._first, self._last + 1)
            for i in self._batches.items(batch)
        ]
        self._checkpoint.failure = (
            f"Epoch {self._epoch + 1}, {batches} of {self._batches.steps} ({self._batches.items_are} {items} of the "
            f"data): {reason}. Training stops; weights and optimizer are again as they were {state}"
        )
        warnings.warn(self._checkpoint.failure, stacklevel=2)
        self.model.stop_training = True


def _describe_position(position):
    """A position in words, which count from 1."""
    if position["batch"]:
        return f"epoch {position['epoch'] + 1}, batch {position['batch']}"
    return f"epoch {position['epoch']}" if position["epoch"] else "no step"


def _check_equal(path, what, saved, current):
    for name in [*current, *saved]:
        is_same = fingerprint.may_be_equal if name == "fingerprint" else operator.eq
        if not is_same(saved.get(name, ""), current.get(name, "")):
            raise ValueError(
                f"{path} is of another run: its {what} had {name} = {saved.get(name)}. Received: {current.get(name)}. "
                "Give this run another folder"
            )
