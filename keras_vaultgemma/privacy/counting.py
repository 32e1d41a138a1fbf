"""The callback that writes every private step into the ledger before it is done."""

import warnings

import keras
from keras import ops

COUNTING = "_Counting 0"
"""Name under which a `TrainingCheckpoint` keeps what the callback has counted."""


def iterations(model):
    """Return how many updates a model's optimizer has done."""
    return int(ops.convert_to_numpy(model.optimizer.iterations)) if model.optimizer else 0


def counting_callback(record, is_cut_short, per_epoch, done):
    """Return a `_Counting` callback, whose class keeps its name for the sake of old checkpoints."""
    return _Counting(record, is_cut_short, per_epoch, done)


class _Counting(keras.callbacks.Callback):
    """Callback that writes each step into the ledger before it is done, and ends `fit` with the
    budget.

    A `TrainingCheckpoint` saves its `counted` under the name of this class, which therefore stays.

    Args:
        record: `PrivacyRecord` with an open run.
        is_cut_short: bool. True if the run ends before `fit` would.
        per_epoch: int. Steps of an epoch.
        done: int. Steps before the first one of this `fit`.

    Attributes:
        counted: dict `{name: steps}` of the runs that the weights come from.
    """

    kept = ("counted",)

    def __init__(self, record, is_cut_short, per_epoch, done):
        super().__init__()
        self.counted = {}
        self._record, self._is_cut_short = record, is_cut_short
        self._per_epoch, self._done = per_epoch, done
        self._first_iteration = None

    def updates(self):
        """Return how many updates the optimizer has done since the first step."""
        if self._first_iteration is None:
            return 0
        return iterations(self.model) - self._first_iteration

    def on_epoch_begin(self, epoch, logs=None):
        first, before = divmod(self._done, self._per_epoch)
        self._left = self._per_epoch - (before if epoch == first else 0)

    def on_train_batch_begin(self, batch, logs=None):
        if batch >= self._left:
            # A resumed epoch has fewer steps than Keras expects, and each step must be counted.
            raise StopIteration
        if self._first_iteration is None:  # after a checkpoint has been restored
            self._first_iteration = iterations(self.model)
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
