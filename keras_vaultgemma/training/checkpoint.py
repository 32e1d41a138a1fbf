"""A checkpoint of a training run that is saved while it trains and from which `fit` resumes."""

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from keras_vaultgemma._validation import is_integer
from keras_vaultgemma.data.token_ids import first_columns
from keras_vaultgemma.training.batches import Batches
from keras_vaultgemma.training.resumable_run import ResumableRun, is_of_version_0_1
from keras_vaultgemma.training.state import read_state_metadata

FILE = "training.state"
"""Name of a checkpoint's only file."""


class TrainingCheckpoint(keras.callbacks.Callback):
    """Callback that saves a run of `VaultGemmaCausalLM.fit`, which resumes if the script is rerun.

    A process can be killed at any time. If the same script runs again, training continues after the
    last saved batch, and the final weights are those of a run without interruption: bit for bit on
    JAX; within 1e-6 on TensorFlow, where now and then a run differs in the last bit, and on
    PyTorch, whose sums depend on the alignment of memory.

    The checkpoint contains the trainable weights, the optimizer's variables (step count, moments,
    accumulated gradients, and the learning rate unless it is a schedule), the seeds of random
    layers, the seed of the data's order and the position in it, the metrics of the current epoch,
    and the attributes of `History`, `EarlyStopping`, `ReduceLROnPlateau` and `ModelCheckpoint` that
    last longer than an epoch. A callback of your own names such attributes in an attribute `kept`.
    Frozen weights are not saved; the script must load the same ones again.

    The checkpoint is a single file, which a new one replaces only after that is completely on the
    disk. If a save fails, training continues with a warning, except for the save before the first
    step, which raises. The checkpoint remains after the run. The same call of `fit` then returns at
    once with the final weights, or continues if `epochs` is larger, so that each call of `fit`
    needs a folder of its own.

    Training stops with a warning that names the batch if the loss or a weight becomes NaN or
    infinite. The model then gets back the last finite state: that before the batch if the state has
    at most 64 MB, as with LoRA, and that of the checkpoint otherwise. Larger weights are checked
    only when they are saved, so that an earlier batch can be the cause; the warning says so. The
    file never contains weights that are not finite.

    Data must be strings, arrays, or a `keras.utils.PyDataset` that returns the same batch for the
    same index in every epoch; its `workers` are not used. With this callback `fit` shuffles in
    another order than without it. Only one process can use a checkpoint.

    `keras.callbacks.BackupAndRestore`, by comparison, saves weights, optimizer and epoch, but
    neither order nor position of the data, metrics or other callbacks, and overwrites its only file
    in place.

    Args:
        folder: string or path. Folder of the checkpoint, created if it does not exist.
        save_freq: "epoch" or int. Number of batches after which to save. Defaults to "epoch".

    Attributes:
        path: `pathlib.Path` of the checkpoint's file.
        save_freq: "epoch" or int. The argument.
        failure: string. The warning of the batch that stopped the last `fit`, or None.

    Raises:
        ValueError: If `save_freq` is out of range. `fit` raises it if the checkpoint is damaged or
            belongs to another model, optimizer or data, or the data cannot be read at any position.
        OSError: `fit` raises it if the first checkpoint cannot be written.

    Example:

    ```python
    from keras_vaultgemma import TrainingCheckpoint, VaultGemmaCausalLM

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.backbone.enable_lora(rank=4)
    model.compile(optimizer="adam")
    checkpoint = TrainingCheckpoint("my_run", save_freq=1)
    model.fit(
        ["The hare was asleep.", "The tortoise was not."],
        batch_size=1,
        callbacks=[checkpoint],
        verbose=0,
    )
    print(checkpoint.position)  # {'epoch': 1, 'batch': 0, 'is_finished': False}
    ```
    """

    def __init__(
        self, folder: str | os.PathLike, save_freq: int | Literal["epoch"] = "epoch"
    ) -> None:
        super().__init__()
        if save_freq != "epoch" and not is_integer(save_freq):
            raise ValueError(
                "`save_freq` must be 'epoch' or a positive integer. "
                f"Received: save_freq={save_freq!r}"
            )
        self.path = Path(folder) / FILE
        self.save_freq = save_freq
        self.failure: str | None = None

    @property
    def position(self) -> dict[str, Any] | None:
        """Position from which the saved run resumes, or None if no run is saved.

        A dict of "epoch" and "batch", both counted from 0, and "is_finished", which is True if a
        callback ended the run.
        """
        return read_state_metadata(self.path)["position"] if self.path.exists() else None

    def on_train_begin(self, logs=None):
        # `resumable` replaces this callback by a `ResumableRun`.
        raise ValueError(
            "A TrainingCheckpoint must be in the list of `callbacks` of `VaultGemmaCausalLM.fit`"
        )


def all_callbacks(arguments):
    """Return the callbacks in a dict of arguments of `fit`, also those inside a `CallbackList`."""

    def expand(value):
        for callback in keras.tree.flatten(value or []):
            if isinstance(callback, keras.callbacks.CallbackList):
                yield from expand(callback.callbacks)
            else:
                yield callback

    return list(expand(arguments.get("callbacks")))


def checkpoint_of(arguments):
    """Return the `TrainingCheckpoint` among the callbacks in a dict of arguments of `fit`, or None.

    Raises:
        ValueError: If there is more than one.
    """
    checkpoints = [c for c in all_callbacks(arguments) if isinstance(c, TrainingCheckpoint)]
    if len(checkpoints) > 1:
        raise ValueError(
            "`callbacks` must contain at most one TrainingCheckpoint. "
            f"Received: {len(checkpoints)} of them"
        )
    return checkpoints[0] if checkpoints else None


def resumes_version_0_1(arguments):
    """Return True if a dict of arguments of `fit` resumes a run that version 0.1.0 began."""
    checkpoint = checkpoint_of(arguments)
    if checkpoint is None or not checkpoint.path.exists():
        return False
    return is_of_version_0_1(read_state_metadata(checkpoint.path))


@contextlib.contextmanager
def resumable(model, arguments, columns=None):
    """Yield arguments for `keras.Model.fit` with which a `TrainingCheckpoint` saves and resumes.

    Args:
        model: compiled `keras.Model`.
        arguments: dict. Arguments of `keras.Model.fit`, whose data are all that changes if there is
            no `TrainingCheckpoint` among the callbacks.
        columns: int. Number of columns of arrays to train on, or None for all. Defaults to None.

    Raises:
        ValueError: See `TrainingCheckpoint`.
    """
    checkpoint = checkpoint_of(arguments)
    if checkpoint is None:
        data = {name: arguments.get(name) for name in ("x", "y", "sample_weight")}
        yield {**arguments, **first_columns(data, columns)}
        return
    if arguments.get("validation_split"):
        raise ValueError(
            "`validation_split` must be None with a TrainingCheckpoint; use `validation_data`. "
            f"Received: validation_split={arguments['validation_split']!r}"
        )
    checkpoint.failure = None
    saved = read_state_metadata(checkpoint.path) if checkpoint.path.exists() else None
    arguments = {"epochs": 1, "initial_epoch": 0, **arguments}
    x, y, weight = (arguments.pop(name, None) for name in ("x", "y", "sample_weight"))
    is_dataset = isinstance(x, keras.utils.PyDataset)
    batches = Batches(
        x if is_dataset else keras.utils.pack_x_y_sample_weight(x, y, weight),
        batch_size=arguments.get("batch_size") or 32,
        shuffle=arguments.pop("shuffle", True),
        seed=saved["seed"] if saved else int(np.random.randint(2**31)),
        steps_per_epoch=arguments.pop("steps_per_epoch", None),
        columns=columns,
    )
    callbacks = [
        callback
        for callback in keras.tree.flatten(arguments.get("callbacks") or [])
        if callback is not checkpoint
    ]
    if not any(isinstance(callback, keras.callbacks.History) for callback in callbacks):
        callbacks.append(keras.callbacks.History())
    run = ResumableRun(checkpoint, model, batches, callbacks, saved, arguments["initial_epoch"])
    epochs, is_finished = arguments["epochs"], run.start["is_finished"]
    with warnings.catch_warnings():
        if run.start["batch"]:
            # Keras expects a whole epoch and would report the rest of one as missing data.
            warnings.filterwarnings("ignore", message="Your input ran out of data")
        yield {
            **arguments,
            "x": batches,
            "shuffle": False,
            "initial_epoch": epochs if is_finished else run.start["epoch"],
            # Last, because it saves the state of the other callbacks after each epoch.
            "callbacks": [*callbacks, run],
        }
