"""The callback that saves, restores and supervises one call of `fit` with a checkpoint."""

import operator
import warnings

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.training.state import (
    GROUPS,
    adapter_identity,
    assign_values,
    best_weight_arrays,
    callback_states,
    copy_values,
    metric_variables,
    model_identity,
    optimizer_identity,
    read_state_arrays,
    restore_callbacks,
    state_nbytes,
    state_variables,
    weights_are_finite,
    write_state,
)

COPY_LIMIT = 2**26
"""Bytes of the largest state that is copied after each step. LoRA of rank 8 at 1B has 16 MB."""


class ResumableRun(keras.callbacks.Callback):
    """One call of `fit` with a `TrainingCheckpoint`.

    Args:
        checkpoint: `TrainingCheckpoint`.
        model: compiled `keras.Model` whose optimizer is built.
        batches: `Batches` to train on.
        callbacks: list of the other callbacks of this call.
        saved: dict. Metadata of the checkpoint's file, or None for a new run.
        initial_epoch: int. First epoch of a new run.

    Attributes:
        start: dict. Position at which training starts: "epoch" and "batch", both counted from 0,
            and "is_finished".
    """

    def __init__(self, checkpoint, model, batches, callbacks, saved, initial_epoch):
        super().__init__()
        self._checkpoint, self._batches = checkpoint, batches
        self._callbacks, self._saved = callbacks, saved
        self._identity = {
            "seed": batches.seed,
            "data": batches.identity,
            "model": model_identity(model),
            "optimizer": optimizer_identity(model),
            "adapter": adapter_identity(model),
        }
        self.start = {"epoch": initial_epoch, "batch": 0, "is_finished": False}
        if saved:
            self._check_identity("data", batches.identity_comparisons)
            self._check_identity("model", {})
            for part in ("optimizer", "adapter"):
                if is_of_version_0_1(saved):
                    del self._identity[part]
                else:
                    self._check_identity(part, {})
            self.start = saved["position"]
        self._saved_position = self.start
        self._variables = state_variables(model)
        self._copies_state = state_nbytes(self._variables) <= COPY_LIMIT
        self._last_finite_state, self._unsaved_batches, self._epoch = None, 0, None

    def on_train_begin(self, logs=None):
        path = self._checkpoint.path
        if self._saved:
            self._restore_model()
            best_weights = dict(read_state_arrays(path, "best"))
            # "memories" is the name of the callbacks' states in the file format.
            restore_callbacks(self.model, self._callbacks, self._saved["memories"], best_weights)
            if self.params.get("verbose"):
                print(f"{path}: resuming after {_describe_position(self.start)}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.start)
        self._last_finite_state = copy_values(self._variables) if self._copies_state else None

    def on_epoch_begin(self, epoch, logs=None):
        offset = self.start["batch"] if epoch == self.start["epoch"] else 0
        self._epoch = epoch
        self._batches.start(epoch, offset)
        if offset:
            self._restore_metrics()

    def on_train_batch_begin(self, batch, logs=None):
        if batch >= len(self._batches):
            # The epoch ends here. Keras would continue until the data run out. TensorFlow would
            # then already have run the parts of a step that need no data: count the step, draw
            # seeds and decay weights.
            raise StopIteration
        step = (self._batches.seed, self._epoch, self._batches.offset + batch)
        seed = np.random.SeedSequence(step).generate_state(1, "uint64")[0]
        backend.seed_global_generator(int(seed))
        self._first = batch

    def on_train_batch_end(self, batch, logs=None):
        # With `steps_per_execution`, one call covers the batches `_first` to `_last`, and Keras can
        # report a number beyond the end of the epoch.
        self._last = min(batch, len(self._batches) - 1)
        self._unsaved_batches += self._last + 1 - self._first
        # Private training reports no loss, because it leaves out rows whose loss is not finite.
        loss = logs.get("loss", 0.0)
        if not np.isfinite(loss):
            reason = f"the loss is {loss}"
            if self._unchecked_batches():
                reason += " (because of this batch, or of the update after the previous one)"
            self._stop(reason)
            return
        batch = self._batches.offset + self._last + 1
        # The last batch of an epoch is saved in `on_epoch_end`, after the other callbacks.
        is_due = self._is_due() and batch < self._batches.steps
        if self._copies_state or is_due:
            backend.update_variables(self.model)
        if self._copies_state:
            state = copy_values(self._variables)
            if not weights_are_finite(state):
                self._stop("weights are not finite after it")
                return
            self._last_finite_state = state
        if is_due:
            self._save({"epoch": self._epoch, "batch": batch, "is_finished": False})

    def on_epoch_end(self, epoch, logs=None):
        is_due = self._checkpoint.save_freq == "epoch" or self._is_due()
        if is_due and not self.model.stop_training:
            self._save({"epoch": epoch + 1, "batch": 0, "is_finished": False})

    def on_train_end(self, logs=None):
        has_trained = self._epoch is not None
        if has_trained and self._checkpoint.failure is None:
            is_finished = self.model.stop_training
            self._save({"epoch": self._epoch + 1, "batch": 0, "is_finished": is_finished})

    def _unchecked_batches(self):
        """Return the number of batches before the current ones whose weights were not checked."""
        if self._copies_state:
            return 0
        return self._unsaved_batches - (self._last + 1 - self._first)

    def _is_due(self):
        save_freq = self._checkpoint.save_freq
        return save_freq != "epoch" and self._unsaved_batches >= save_freq

    def _save(self, position):
        """Save the state at a position, or stop training if its weights are not finite."""
        if not self._copies_state and not weights_are_finite(self._variables):
            unchecked = self._unchecked_batches()
            blamed = f"it or one of the {unchecked} batches before it" if unchecked else "it"
            self._stop(f"weights are not finite after {blamed}")
            return
        self._unsaved_batches = 0
        try:
            self._write(position)
        except OSError as error:
            warnings.warn(
                f"No checkpoint could be saved after {_describe_position(position)}: {error}. "
                "Training continues; the last checkpoint is that after "
                f"{_describe_position(self._saved_position)}",
                stacklevel=2,
            )

    def _write(self, position):
        state = {
            **self._variables,
            **metric_variables(self.model),
            **best_weight_arrays(self.model, self._callbacks),
        }
        metadata = {
            **self._identity,
            "position": position,
            "memories": callback_states(self._callbacks),
        }
        write_state(self._checkpoint.path, metadata, state)
        self._saved_position = position

    def _restore_model(self):
        assign_values(self._variables, read_state_arrays(self._checkpoint.path, *GROUPS))

    def _restore_metrics(self):
        metrics = dict(read_state_arrays(self._checkpoint.path, "metric"))
        if len(metrics) > len(self.model.metrics_variables):
            # TensorFlow creates the variables of some metrics when they are first used.
            self.model.test_on_batch(*keras.utils.unpack_x_y_sample_weight(self._batches[0]))
        variables = metric_variables(self.model)
        if metrics.keys() != variables.keys():
            raise ValueError(
                f"{self._checkpoint.path} belongs to another run: its model had {len(metrics)} "
                f"variables of metrics. Received: {len(variables)}. Compile with the same metrics, "
                "or use another folder for this run"
            )
        assign_values(variables, metrics.items())

    def _stop(self, reason):
        """Restore the last finite state, set `failure`, warn and stop training."""
        backend.update_variables(self.model)
        if self._copies_state:
            assign_values(self._variables, self._last_finite_state.items())
            restored = "before it"
        else:
            self._restore_model()
            restored = f"after {_describe_position(self._saved_position)}, the last checkpoint"
        first, last = (self._batches.offset + batch + 1 for batch in (self._first, self._last))
        batches = f"batch {last}" if first == last else f"batches {first} to {last}"
        indices = [
            int(i)
            for batch in range(self._first, self._last + 1)
            for i in self._batches.indices(batch)
        ]
        self._checkpoint.failure = (
            f"Epoch {self._epoch + 1}, {batches} of {self._batches.steps} "
            f"({self._batches.unit} {indices} of the data): {reason}. Training stops; weights and "
            f"optimizer are restored to their state {restored}"
        )
        warnings.warn(self._checkpoint.failure, stacklevel=2)
        self.model.stop_training = True

    def _check_identity(self, part, comparisons):
        """Raise ValueError if the saved run had another model, optimizer or data.

        Args:
            part: "data" or "model".
            comparisons: dict `{name: function(saved, current)}` for properties that need not be
                equal.
        """
        saved, current = self._saved[part], self._identity[part]
        for name in [*current, *saved]:
            is_same = comparisons.get(name, operator.eq)
            if not is_same(saved.get(name, ""), current.get(name, "")):
                raise ValueError(
                    f"{self._checkpoint.path} belongs to another run: its {part} had {name} = "
                    f"{saved.get(name)}. Received: {current.get(name)}. Use another folder for "
                    "this run"
                )


def is_of_version_0_1(saved):
    """Return True if a run's saved metadata are of version 0.1.0, which had fewer of them."""
    return "optimizer" not in saved


def _describe_position(position):
    """Describe a position in words, counting epochs and batches from 1."""
    if position["batch"]:
        return f"epoch {position['epoch'] + 1}, batch {position['batch']}"
    return f"epoch {position['epoch']}" if position["epoch"] else "no step"
