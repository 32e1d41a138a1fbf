"""All that training changes in a model and in Keras's callbacks: what it takes to go on as if nothing had happened."""

import hashlib
import json
import math
import os
import struct
import zipfile

import keras
import ml_dtypes  # noqa: F401  (tells NumPy the names of its dtypes)
import numpy as np

from keras_vaultgemma._files import sync_folder

GROUPS = ("weight", "seed", "optimizer")
"""What the names of a model's state start with."""


def state_variables(model):
    """{name: Keras variable} of the weights, the seeds of random layers and the optimizer's variables.

    Among the optimizer's are the count of steps, which is where a learning-rate schedule stands, the moments and the
    accumulated gradients. Frozen weights are left out. Metrics too, since each epoch starts them anew: `metrics` gives
    them.

    Args:
        model: compiled `keras.Model`, its optimizer built.
    """
    weights = {id(v) for v in model.weights}
    return {
        **named("weight", model.trainable_variables),
        **named("seed", [v for v in model.non_trainable_variables if id(v) not in weights]),
        **named("optimizer", model.optimizer.variables),
    }


def metric_variables(model):
    """{name: Keras variable} of the metrics that `fit` reports."""
    return named("metric", model.metrics_variables)


def named(group, items):
    """`{"group/0": first item, ...}`."""
    return {f"{group}/{i}": item for i, item in enumerate(items)}


def copy_values(variables):
    """{name: NumPy array}, in memory of their own: JAX gives a variable's memory to the result of the next step."""
    return {name: np.array(as_array(v)) for name, v in variables.items()}


def assign_values(variables, arrays):
    """Set variables to arrays, (name, array) pairs of which one at a time is read."""
    for name, array in arrays:
        variables[name].assign(array)


def state_nbytes(variables):
    """Bytes that the values of variables take."""
    return sum(math.prod(v.shape) * np.dtype(_dtype(v)).itemsize for v in variables.values())


def weights_are_finite(variables):
    """Whether the weights among variables (or arrays) are finite."""
    weights = [v for name, v in variables.items() if name.startswith("weight/")]
    return all(np.isfinite(as_array(v)).all() for v in weights)


def model_signature(model):
    """What two models must have the same for one to take over the other's state: {entry: string}.

    Of trainable weights and the optimizer's variables these are dtypes and shapes. Frozen weights are not in the state,
    so their values matter: the first row of each, as a SHA-256.
    """
    entries = {"optimizer": type(model.optimizer).__name__}
    for name, v in state_variables(model).items():
        label = v.path if name.startswith("weight/") else name
        entries[label] = f"{_dtype(v)} {list(v.shape)}"
    digest = hashlib.sha256()
    for v in model.non_trainable_weights:
        digest.update(f"{v.path} {list(v.shape)} ".encode())
        digest.update(as_array(v.value[:1] if len(v.shape) else v).tobytes())
    return {**entries, "values of frozen weights": digest.hexdigest()}


def _dtype(variable):
    return keras.backend.standardize_dtype(variable.dtype)


KEPT = {
    keras.callbacks.History: ("epoch", "history"),
    keras.callbacks.EarlyStopping: ("best", "best_epoch", "wait", "stopped_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("best", "wait", "cooldown_counter"),
    keras.callbacks.ModelCheckpoint: ("best",),
}
"""What Keras's callbacks remember from epoch to epoch; `EarlyStopping` has weights too, if it is to restore them.

Other classes of callbacks name the attributes in one of their own, `kept`.
"""


def callback_memories(callbacks):
    """What callbacks remember: {"class number": {attribute: value}} for JSON."""
    return {
        key: {name: getattr(callback, name) for name in names}
        for key, names, callback in _with_memory(callbacks)
    }


def best_weight_arrays(model, callbacks):
    """{name: array} of the trainable weights among those that an `EarlyStopping` has found best so far."""
    return {
        f"best/{key}/{i}": callback.best_weights[i]
        for key, _, callback in _with_memory(callbacks)
        if getattr(callback, "best_weights", None) is not None
        for i, v in enumerate(model.weights)
        if v.trainable
    }


def restore_callbacks(model, callbacks, memories, best_weights):
    """Give callbacks back what `memories` and `best_weights` have of callbacks of the same class and number."""
    for key, _, callback in _with_memory(callbacks):
        for name, value in memories.get(key, {}).items():
            setattr(callback, name, value)
        if any(name.startswith(f"best/{key}/") for name in best_weights):
            weights = enumerate(model.get_weights())
            callback.best_weights = [
                best_weights.get(f"best/{key}/{i}", weight) for i, weight in weights
            ]


def _with_memory(callbacks):
    kinds = KEPT | {
        type(callback): callback.kept for callback in callbacks if hasattr(callback, "kept")
    }
    for kind, names in kinds.items():
        for number, callback in enumerate(
            callback for callback in callbacks if isinstance(callback, kind)
        ):
            yield f"{kind.__name__} {number}", names, callback


# MERGED: """One file of named arrays and facts that is whole at any time, whatever ends the process that writes it. A zip archive of .npy files, which has a CRC-32 of each; NumPy's own .npz would hold all arrays in memory at once. """
FACTS = "facts.json"


def write_state(path, facts, values):
    """Write a file beside `path`, see it on disk, and put it in the place of `path`.

    Args:
        path: `pathlib.Path` in a folder that exists.
        facts: dict for JSON.
        values: {name: Keras variable or array}; no more than one is copied at a time.

    Raises:
        OSError: where it cannot be written; `path` is then as it was.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(FACTS, json.dumps(facts, default=float))
                for name, value in values.items():
                    _write_array(archive, name, as_array(value))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def as_array(value):
    """A Keras variable's value as a NumPy array, which may be the very memory; an array as it is."""
    return np.asarray(
        keras.ops.convert_to_numpy(value.value if isinstance(value, keras.Variable) else value)
    )


def read_state_facts(path):
    """The facts of a file that `write` made, after all of it has been read and its check sums compared.

    Raises:
        ValueError: where the file is cut short or damaged.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                if damaged is None:
                    return json.loads(archive.read(FACTS))
        except (
            zipfile.BadZipFile,
            EOFError,
            KeyError,
            OSError,
            RuntimeError,
            ValueError,
            struct.error,
        ) as error:
            damaged = error
    raise ValueError(
        f"{path} is cut short or damaged ({damaged}). Delete it to start the run again"
    )


def read_state_arrays(path, *groups):
    """Iterate over (name, array) of a file that `read_facts` has accepted, for names that start with "group/"."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            if entry.partition("/")[0] in groups:
                yield _read_array(archive, entry)


# NumPy's format has no bfloat16: an entry's name tells its dtype, and the bits are those of an unsigned integer.


def _write_array(archive, name, array):
    bits = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
    with archive.open(f"{name}.{array.dtype.name}", "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, bits, allow_pickle=False)


def _read_array(archive, entry):
    name, _, dtype = entry.rpartition(".")
    with archive.open(entry) as file:
        return name, np.lib.format.read_array(file, allow_pickle=False).view(dtype)
