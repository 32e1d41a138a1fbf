"""Training that survives: killed at any moment and started again, it ends where it would have ended."""

import contextlib
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_vaultgemma.training.batches import Batches
from keras_vaultgemma.training.checkpointed_run import CheckpointedRun
from keras_vaultgemma.training.state import read_state_facts

FILE = "training.state"
"""The one file of a checkpoint (state_file.py)."""


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
    at most 64 MB, as with LoRA, else the checkpoint's. (Larger weights are looked at only when they are saved: then it
    may be an earlier batch that spoiled them, as the warning says.) The file has no other weights than finite ones.

    It is for one process; of several, each would write the same file.

    Data must be strings, arrays, or a `keras.utils.PyDataset` that gives the same batch for the same index in every
    epoch, and whose `workers` are not used. The order is that of `Batches`, not the one in which `fit` shuffles without
    this callback.

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
            raise ValueError(
                f"`save_freq` must be 'epoch' or a positive integer. Received: save_freq={save_freq!r}"
            )
        self.path = Path(folder) / FILE
        self.save_freq = save_freq
        self.failure = None

    @property
    def position(self):
        """Where the saved run goes on: {"epoch", "batch", both from 0, "is_finished"}; None where nothing is saved."""
        return read_state_facts(self.path)["position"] if self.path.exists() else None

    def on_train_begin(self, logs=None):
        # `resumable` puts a `CheckpointedRun` in its place.
        raise ValueError(
            "A TrainingCheckpoint must be in the list of `callbacks` of `VaultGemmaCausalLM.fit`"
        )


def checkpoint_of(arguments):
    """The `TrainingCheckpoint` among the callbacks in a dict of arguments of `fit`, or None."""
    callbacks = keras.tree.flatten(arguments.get("callbacks") or [])
    checkpoints = [callback for callback in callbacks if isinstance(callback, TrainingCheckpoint)]
    if len(checkpoints) > 1:
        raise ValueError(
            f"A run has one TrainingCheckpoint. Received: {len(checkpoints)} in `callbacks`"
        )
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
        raise ValueError(
            "A run with a TrainingCheckpoint takes `validation_data` instead of a `validation_split`"
        )
    checkpoint.failure = None
    saved = read_state_facts(checkpoint.path) if checkpoint.path.exists() else None
    arguments = {"epochs": 1, "initial_epoch": 0, **arguments}
    x, y, weight = (arguments.pop(name, None) for name in ("x", "y", "sample_weight"))
    batches = Batches(
        x
        if isinstance(x, keras.utils.PyDataset)
        else keras.utils.pack_x_y_sample_weight(x, y, weight),
        batch_size=arguments.get("batch_size") or 32,
        shuffle=arguments.pop("shuffle", True),
        seed=saved["seed"] if saved else int(np.random.randint(2**31)),
        steps_per_epoch=arguments.pop("steps_per_epoch", None),
    )
    others = [callback for callback in callbacks if callback is not checkpoint]
    if not any(isinstance(callback, keras.callbacks.History) for callback in others):
        others.append(keras.callbacks.History())
    run = CheckpointedRun(checkpoint, model, batches, others, saved, arguments["initial_epoch"])
    with warnings.catch_warnings():
        if run.start["batch"]:
            # Keras counts on a whole epoch, and takes the rest of one for data that has run out.
            warnings.filterwarnings("ignore", message="Your input ran out of data")
        yield {
            **arguments,
            "x": batches,
            "shuffle": False,
            "initial_epoch": arguments["epochs"]
            if run.start["is_finished"]
            else run.start["epoch"],
            # Last, since it saves what the others have made of an epoch.
            "callbacks": [*others, run],
        }
