"""What is to be seen of a run as it goes: tokens a second and the loss of each step."""

import time

import keras


class Pace(keras.callbacks.Callback):
    """Adds `tokens_per_second` to what `fit` logs, and keeps the loss of each step.

    The rate is that of the epoch so far, without the first step of a process, which compiles.

    Args:
        tokens_per_step: on average, padding not among them.

    Attributes:
        losses: list of the epoch's mean loss so far, one for each step of the run.
        kept: what a `TrainingCheckpoint` saves of it.
    """

    kept = ("losses",)

    def __init__(self, tokens_per_step):
        super().__init__()
        self._tokens_per_step = tokens_per_step
        self.losses = []
        self._is_compiled = False

    def on_epoch_begin(self, epoch, logs=None):
        self._start, self._done = time.perf_counter(), 0

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        # Private training has one of another name.
        self.losses += [float(value) for name, value in logs.items() if name.endswith("loss")][:1]
        self._done += 1
        self._rate = self._done * self._tokens_per_step / (now - self._start)
        if not self._is_compiled:
            self._is_compiled, self._start, self._done = True, now, 0
        logs["tokens_per_second"] = self._rate

    def on_epoch_end(self, epoch, logs=None):
        logs["tokens_per_second"] = self._rate
