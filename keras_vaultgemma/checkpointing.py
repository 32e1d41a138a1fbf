"""Training that survives: killed at any moment and started again, it ends where it would have ended."""

import contextlib
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_vaultgemma import backend, state_file, training_state
from keras_vaultgemma.batches import Batches

FILE = "training.state"
"""The one file of a checkpoint (state_file.py)."""

COPY_LIMIT = 2**26
"""Bytes of state up to which the last good one is copied at each step. LoRA of rank 8 on the 1B model has 16 MB."""


class TrainingCheckpoint(keras.callbacks.Callback):
    """Saves a run of `VaultGemmaCausalLM.fit` as it goes; the same script, started again, goes on from there.

    ```python
    model.fit(texts, epochs=3, callbacks=[TrainingCheckpoint("my_run", save_freq=100)])
    ```

    Saved are the trainable weights, the optimizer's variables (step count, moments, accumulated gradients, and the
    learning rate where it is no schedule), the seeds of random layers, the seed of the data's order and the position in
    it, the metrics of the epoch so far, `History`, and what `EarlyStopping`, `ReduceLROnPlateau` and `ModelCheckpoint`
    remember (and what a callback of your own names in an attribute `kept`). So the final weights are those of a run
    that nobody interrupted: to the bit on JAX and TensorFlow, within 1e-6 on PyTorch, whose sums depend on where its
    memory lies.

    The checkpoint is one file, which gives way to the next only when that is whole and on disk. A save that fails is a
    warning, and training goes on, but for the first save, before the first step. Frozen weights are not saved: the
    script must load the same again. After the end the checkpoint stays, and the same `fit` returns at once with the
    final weights, or goes on where `epochs` has become larger: each call of `fit` needs a folder of its own.

    (`keras.callbacks.BackupAndRestore` saves weights, optimizer and epoch, but neither the order of the data nor the
    place in it, metrics or what other callbacks remember, and writes over the only file it has.)

    The loss is watched, too. After a batch whose loss is not finite, or after which a weight is not, training stops
    with a warning that names the batch, and the last good state is put back: that before the batch where the state has
    at most 64 MB, as with LoRA, else the checkpoint's. The file has no other weights than finite ones.

    It is for one process; of several, each would write the same file.

    Data must be strings, arrays, or a `keras.utils.PyDataset` that gives the same batch for the same index in every
    epoch. The order is that of `Batches`, not the one in which `fit` shuffles without this callback.

    Args:
        folder: of the checkpoint; made where it does not exist.
        save_freq: "epoch", or after how many batches to save.

    Attributes:
        failure: the warning of the batch that stopped the last `fit`, or None.

    Raises:
        ValueError: for `save_freq` out of range; by `fit` for a checkpoint that is damaged or of another model,
            optimizer or data, and for data that cannot be read at a position.
        OSError: by `fit` where the first checkpoint cannot be written.
    """

    def __init__(self, folder, save_freq="epoch"):
        super().__init__()
        is_count = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0
        if save_freq != "epoch" and not is_count:
            raise ValueError(f"`save_freq` must be 'epoch' or a positive integer. Received: save_freq={save_freq!r}")
        self.path = Path(folder) / FILE
        self.save_freq = save_freq
        self.failure = None

    @property
    def position(self):
        """Where the saved run goes on: {"epoch", "batch", both from 0, "is_finished"}; None where nothing is saved."""
        return state_file.read_facts(self.path)["position"] if self.path.exists() else None

    def on_train_begin(self, logs=None):
        # `resumable` puts a `_Run` in its place.
        raise ValueError("A TrainingCheckpoint must be in the list of `callbacks` of `VaultGemmaCausalLM.fit`")


def checkpoint_of(arguments):
    """The `TrainingCheckpoint` among the callbacks in a dict of arguments of `fit`, or None."""
    callbacks = keras.tree.flatten(arguments.get("callbacks") or [])
    checkpoints = [callback for callback in callbacks if isinstance(callback, TrainingCheckpoint)]
    if len(checkpoints) > 1:
        raise ValueError(f"A run has one TrainingCheckpoint. Received: {len(checkpoints)} in `callbacks`")
    return checkpoints[0] if checkpoints else None


@contextlib.contextmanager
def resumable(model, arguments):
    """Arguments for `keras.Model.fit` that let a `TrainingCheckpoint` among the callbacks do its work.

    Args:
        model: compiled `keras.Model`.
        arguments: dict of arguments of `keras.Model.fit`; used unchanged where there is no `TrainingCheckpoint`.

    Raises:
        ValueError: as `TrainingCheckpoint` says.
    """
    callbacks = keras.tree.flatten(arguments.get("callbacks") or [])
    checkpoint = checkpoint_of(arguments)
    if checkpoint is None:
        yield arguments
        return
    if arguments.get("validation_split"):
        raise ValueError("A run with a TrainingCheckpoint takes `validation_data` instead of a `validation_split`")
    checkpoint.failure = None
    saved = state_file.read_facts(checkpoint.path) if checkpoint.path.exists() else None
    arguments = {"epochs": 1, "initial_epoch": 0, **arguments}
    x, y, weight = (arguments.pop(name, None) for name in ("x", "y", "sample_weight"))
    batches = Batches(
        x if isinstance(x, keras.utils.PyDataset) else keras.utils.pack_x_y_sample_weight(x, y, weight),
        batch_size=arguments.get("batch_size") or 32,
        shuffle=arguments.pop("shuffle", True),
        seed=saved["seed"] if saved else int(np.random.randint(2**31)),
        steps_per_epoch=arguments.pop("steps_per_epoch", None),
    )
    others = [callback for callback in callbacks if callback is not checkpoint]
    if not any(isinstance(callback, keras.callbacks.History) for callback in others):
        others.append(keras.callbacks.History())
    run = _Run(checkpoint, model, batches, others, saved, arguments["initial_epoch"])
    with warnings.catch_warnings():
        if run.start["batch"]:
            # Keras counts on a whole epoch, and takes the rest of one for data that has run out.
            warnings.filterwarnings("ignore", message="Your input ran out of data")
        yield {
            **arguments,
            "x": batches,
            "shuffle": False,
            "initial_epoch": arguments["epochs"] if run.start["is_finished"] else run.start["epoch"],
            # Last, since it saves what the others have made of an epoch.
            "callbacks": [*others, run],
        }


class _Run(keras.callbacks.Callback):
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
        self._checkpoint, self._batches, self._callbacks, self._saved = checkpoint, batches, callbacks, saved
        self._facts = {
            "seed": batches.seed,
            "data": batches.facts,
            "model": training_state.signature(model),
        }
        self.start = {"epoch": initial_epoch, "batch": 0, "is_finished": False}
        if saved:
            for name in ("data", "model"):
                _check_equal(checkpoint.path, name, saved[name], self._facts[name])
            self.start = saved["position"]
        self._position = self.start
        self._variables = training_state.variables(model)
        self._keeps_copy = training_state.nbytes(self._variables) <= COPY_LIMIT
        self._good, self._unsaved, self._epoch = None, 0, None

    def on_train_begin(self, logs=None):
        path = self._checkpoint.path
        if self._saved:
            self._restore_model()
            best = dict(state_file.read_arrays(path, "best"))
            training_state.restore_memories(self.model, self._callbacks, self._saved["memories"], best)
            if self.params.get("verbose"):
                print(f"{path}: going on after {_place(self.start)}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.start)
        self._good = training_state.copy(self._variables) if self._keeps_copy else None

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
        backend.seed_global_generator(int(np.random.SeedSequence(step).generate_state(1, "uint64")[0]))
        self._first = batch

    def on_train_batch_end(self, batch, logs=None):
        # With `steps_per_execution` these are several, and the last of an epoch may be said to be beyond its end.
        self._last = min(batch, len(self._batches) - 1)
        self._unsaved += self._last + 1 - self._first
        loss = logs.get("loss", 0.0)  # private training has none: a row without a finite loss has no part in it
        if not np.isfinite(loss):
            self._stop(f"the loss is {loss}")
            return
        done = self._batches.done + self._last + 1
        is_due = self._is_due() and done < self._batches.steps  # after an epoch's last batch callbacks come first
        if self._keeps_copy or is_due:
            backend.update_variables(self.model)
        if self._keeps_copy:
            state = training_state.copy(self._variables)
            if not training_state.is_finite(state):
                self._stop("it leaves weights that are not finite")
                return
            self._good = state
        if is_due:
            self._save({"epoch": self._epoch, "batch": done, "is_finished": False})

    def on_epoch_end(self, epoch, logs=None):
        if not self.model.stop_training and (self._checkpoint.save_freq == "epoch" or self._is_due()):
            self._save({"epoch": epoch + 1, "batch": 0, "is_finished": False})

    def on_train_end(self, logs=None):
        # Nothing to save where nothing was left to train.
        if self._checkpoint.failure is None and self._epoch is not None:
            self._save({"epoch": self._epoch + 1, "batch": 0, "is_finished": self.model.stop_training})

    def _is_due(self):
        return self._checkpoint.save_freq != "epoch" and self._unsaved >= self._checkpoint.save_freq

    def _save(self, position):
        if not self._keeps_copy and not training_state.is_finite(self._variables):
            self._stop("it leaves weights that are not finite")
            return
        self._unsaved = 0
        try:
            self._write(position)
        except OSError as error:
            warnings.warn(
                f"No checkpoint could be saved after {_place(position)}: {error}. Training goes on; the checkpoint "
                f"after {_place(self._position)} stands",
                stacklevel=2,
            )

    def _write(self, position):
        values = {
            **self._variables,
            **training_state.metrics(self.model),
            **training_state.best_weights(self.model, self._callbacks),
        }
        facts = {**self._facts, "position": position, "memories": training_state.memories(self._callbacks)}
        state_file.write(self._checkpoint.path, facts, values)
        self._position = position

    def _restore_model(self):
        arrays = state_file.read_arrays(self._checkpoint.path, *training_state.GROUPS)
        training_state.assign(self._variables, arrays)

    def _restore_metrics(self):
        metrics = dict(state_file.read_arrays(self._checkpoint.path, "metric"))
        if len(metrics) > len(self.model.metrics_variables):
            # TensorFlow makes the variables of some metrics when they are first used.
            self.model.test_on_batch(*keras.utils.unpack_x_y_sample_weight(self._batches[0]))
        variables = training_state.metrics(self.model)
        if metrics.keys() != variables.keys():
            raise ValueError(
                f"{self._checkpoint.path} is of another run: its model had {len(metrics)} variables of metrics. "
                f"Received: {len(variables)}. Compile with the same metrics, or give this run another folder"
            )
        training_state.assign(variables, metrics.items())

    def _stop(self, reason):
        backend.update_variables(self.model)
        if self._keeps_copy:
            training_state.assign(self._variables, self._good.items())
            state = "before it"
        else:
            self._restore_model()
            state = f"after {_place(self._position)}, the last checkpoint"
        first, last = (self._batches.done + batch + 1 for batch in (self._first, self._last))
        batches = f"batch {last}" if first == last else f"batches {first} to {last}"
        items = [int(i) for batch in range(self._first, self._last + 1) for i in self._batches.items(batch)]
        self._checkpoint.failure = (
            f"Epoch {self._epoch + 1}, {batches} of {self._batches.steps} ({self._batches.items_are} {items} of the "
            f"data): {reason}. Training stops; weights and optimizer are again as they were {state}"
        )
        warnings.warn(self._checkpoint.failure, stacklevel=2)
        self.model.stop_training = True


def _place(position):
    """A position in words, which count from 1."""
    if position["batch"]:
        return f"epoch {position['epoch'] + 1}, batch {position['batch']}"
    return f"epoch {position['epoch']}" if position["epoch"] else "no step"


def _check_equal(path, what, saved, current):
    for name in [*current, *saved]:
        if saved.get(name) != current.get(name):
            raise ValueError(
                f"{path} is of another run: its {what} had {name} = {saved.get(name)}. Received: {current.get(name)}. "
                "Give this run another folder"
            )
