"""Small models, data and runs with checkpoints that several tests share."""

import functools
import os
import signal

import keras
import numpy as np
from common import random_backbone

from keras_vaultgemma import TrainingCheckpoint, VaultGemmaCausalLM
from keras_vaultgemma.training.checkpoint import resumable
from keras_vaultgemma.training.state import assign_values, copy_values, state_variables, write_state

# PyTorch's sums depend on the alignment of memory; on TensorFlow a run seldom differs in the last bit.
TOLERANCE = 0 if keras.config.backend() == "jax" else 1e-6
ROWS = np.random.default_rng(0).integers(3, 32, (10, 7))
IDS = {"token_ids": ROWS[:, :-1], "padding_mask": np.ones((10, 6), "int32")}
LABELS = ROWS[:, 1:]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows = slice(2 * index, 2 * index + 2)
        return {name: array[rows] for name, array in IDS.items()}, LABELS[rows]


class WithWorkers(Batches):
    def __init__(self):
        super().__init__(workers=3)


class Interrupt(keras.callbacks.Callback):
    """Callback that raises InterruptedError after `step` batches of this call of `fit`."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise InterruptedError


class Kill(Interrupt):
    """Callback that kills the process after `step` batches of this call of `fit`."""

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def small(optimizer="adam", dtype=None, num_layers=1, vocabulary_size=32, **kwargs):
    sizes = dict(
        num_layers=num_layers,
        vocabulary_size=vocabulary_size,
        hidden_dim=16,
        intermediate_dim=24,
        head_dim=8,
        num_query_heads=2,
    )
    model = VaultGemmaCausalLM(random_backbone(**sizes, num_key_value_heads=2, dtype=dtype))
    model.compile(optimizer, **kwargs)
    return model


def fit(model, folder, x=IDS, y=LABELS, save_freq=1, callbacks=(), **kwargs):
    """Train three epochs of three batches with a checkpoint, and return the callback."""
    checkpoint = TrainingCheckpoint(folder, save_freq)
    arguments = {
        "batch_size": 4,
        "epochs": 3,
        "verbose": 0,
        "callbacks": [*callbacks, checkpoint],
        **kwargs,
    }
    if isinstance(model, VaultGemmaCausalLM):
        model.fit(x, y, **arguments)
    else:
        with resumable(model, {"x": x, "y": y, **arguments}) as arguments:
            model.fit(**arguments)
    return checkpoint


def state(model):
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return state_variables(model)


@functools.cache
def compiled(make):
    keras.utils.set_random_seed(0)
    model = make()
    return model, copy_values(state(model))


def fresh(make):
    """Return a model with its initial state, compiled once, because that takes most of a test's time."""
    model, begin = compiled(make)
    assign_values(state(model), begin.items())
    keras.utils.set_random_seed(0)
    return model


def messages(caught):
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def forget(model):
    """Overwrite the model's state and the global seed, as if a new process had built it."""
    for v in state(model).values():
        v.assign(np.ones(v.shape))
    keras.utils.set_random_seed(99)


def assert_equal(found, expected):
    for name in expected:
        np.testing.assert_allclose(
            found[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name
        )


def kill_at_call(number, function):
    calls = []

    def count(*args):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*args)

    return count


def run_in_children(folder):
    """Train in three processes in turn: one killed in a batch, one in a save, one until the end."""
    for number, how in enumerate(["batch", "save", "not"]):
        process = os.fork()
        if process:
            print(
                os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]),
                *sorted(os.listdir(folder / "run")),
            )
            continue
        model = fresh(small)
        if number:
            forget(model)
        if how == "save":
            os.replace = kill_at_call(4, os.replace)
        fit(model, folder / "run", callbacks=[Kill(3)] if how == "batch" else [])
        write_state(folder / "end", {}, state(model))
        os._exit(0)
