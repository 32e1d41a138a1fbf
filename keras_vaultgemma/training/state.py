"""The state of a training run, and the file that holds it.

The state is everything that training changes: trainable weights, seeds of random layers, variables
of the optimizer, metrics, and attributes of callbacks. Variables have names such as `weight/0`,
whose part before the slash is their group.

The file is a zip archive with one `.npy` entry for each array and a JSON entry with the rest. The
archive has a CRC-32 of every entry, so that damage is detected. `numpy.savez` is not used, because
it would hold all arrays in memory at once.
"""

import hashlib
import json
import math
import os
import struct
import zipfile

import keras
import ml_dtypes  # noqa: F401  (registers the names of its dtypes with NumPy)
import numpy as np

from keras_vaultgemma._files import sync_folder
from keras_vaultgemma.lora.injection import adaptable_layers
from keras_vaultgemma.training.optimizers import constants

GROUPS = ("weight", "seed", "optimizer")
"""The groups of variables that are a model's state."""

METADATA = "facts.json"
"""Name of the archive's JSON entry, which is part of the file format."""

CALLBACK_ATTRIBUTES = {
    keras.callbacks.History: ("epoch", "history"),
    keras.callbacks.EarlyStopping: ("best", "best_epoch", "wait", "stopped_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("best", "wait", "cooldown_counter"),
    keras.callbacks.ModelCheckpoint: ("best",),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
}
"""Attributes of Keras's callbacks that last from one epoch to the next.

A callback of another class names its own in an attribute `kept`. `EarlyStopping` has weights as
well if it restores the best ones; see `best_weight_arrays`.
"""


def state_variables(model):
    """Return a model's trainable weights, seeds of random layers, and optimizer variables.

    The optimizer's variables include the step count, on which a learning-rate schedule depends, the
    moments and the accumulated gradients. Frozen weights are not part of the state. Metrics are
    separate (`metric_variables`), because they are reset at the start of each epoch.

    Args:
        model: compiled `keras.Model` whose optimizer is built.

    Returns:
        Dict `{name: Keras variable}`.
    """
    weights = {id(v) for v in model.weights}
    return {
        **enumerate_names("weight", model.trainable_variables),
        **enumerate_names(
            "seed", [v for v in model.non_trainable_variables if id(v) not in weights]
        ),
        **enumerate_names("optimizer", model.optimizer.variables),
    }


def metric_variables(model):
    """Return `{name: Keras variable}` of the metrics that `fit` reports."""
    return enumerate_names("metric", model.metrics_variables)


def enumerate_names(group, items):
    """Return `{"group/0": first item, "group/1": second item, ...}`."""
    return {f"{group}/{i}": item for i, item in enumerate(items)}


def copy_values(variables):
    """Return `{name: NumPy array}` of variables, in memory that the next step does not reuse."""
    return {name: np.array(as_array(v)) for name, v in variables.items()}


def assign_values(variables, arrays):
    """Assign pairs `(name, array)` to variables. Only one array is read at a time."""
    for name, array in arrays:
        variables[name].assign(array)


def state_nbytes(variables):
    """Return the number of bytes that the values of variables take."""
    return sum(math.prod(v.shape) * np.dtype(_dtype(v)).itemsize for v in variables.values())


def weights_are_finite(state):
    """Return True if all weights among `{name: variable or array}` are finite."""
    weights = [v for name, v in state.items() if name.startswith("weight/")]
    return all(np.isfinite(as_array(v)).all() for v in weights)


def model_identity(model):
    """Return the properties that two models must share to exchange their states.

    These are the dtype and shape of each state variable. Frozen weights are not part of the state,
    so that their values must be equal; of each the first row is compared, by a SHA-256.

    Args:
        model: compiled `keras.Model` whose optimizer is built.

    Returns:
        Dict `{property: string}`.
    """
    identity = {"optimizer": type(model.optimizer).__name__}
    for name, v in state_variables(model).items():
        label = v.path if name.startswith("weight/") else name
        identity[label] = f"{_dtype(v)} {list(v.shape)}"
    digest = hashlib.sha256()
    for v in model.non_trainable_weights:
        digest.update(f"{v.path} {list(v.shape)} ".encode())
        digest.update(as_array(v.value[:1] if len(v.shape) else v).tobytes())
    return {**identity, "values of frozen weights": digest.hexdigest()}


def optimizer_identity(model):
    """Return the hyperparameters of a model's optimizer, for JSON.

    A learning rate that is a number is one of the optimizer's variables, which callbacks change and
    which a checkpoint restores. It is compared as it was at `compile`, where that is known.
    """
    found = getattr(model, "optimizer_constants", None) or constants(model.optimizer)
    is_known = hasattr(model, "optimizer_constants")
    return {
        name: value
        for name, value in found.items()
        if is_known or name != "learning_rate" or not isinstance(value, float)
    }


def adapter_identity(model):
    """Return the properties of a model's adapter that its variables do not have, for JSON."""
    layers = adaptable_layers(model.backbone).values() if hasattr(model, "backbone") else []
    adapted = [layer for layer in layers if layer.lora_enabled]
    return {
        "alpha": sorted({float(layer.lora_alpha) for layer in adapted}),
        "dropout": sorted({float(layer.lora_dropout) for layer in adapted}),
    }


def callback_states(callbacks):
    """Return `{"class number": {attribute: value}}` of the saved attributes, for JSON."""
    return {
        key: {name: getattr(callback, name) for name in names}
        for key, names, callback in _with_saved_attributes(callbacks)
    }


def best_weight_arrays(model, callbacks):
    """Return `{name: array}` of the best trainable weights that each `EarlyStopping` holds."""
    return {
        f"best/{key}/{i}": callback.best_weights[i]
        for key, _, callback in _with_saved_attributes(callbacks)
        if getattr(callback, "best_weights", None) is not None
        for i, v in enumerate(model.weights)
        if v.trainable
    }


def restore_callbacks(model, callbacks, states, best_weights):
    """Restore the attributes of callbacks from those of the same class and number.

    Args:
        model: `keras.Model` whose frozen weights complete the best weights.
        callbacks: list of callbacks.
        states: dict that `callback_states` returned.
        best_weights: dict that `best_weight_arrays` returned.
    """
    for key, _, callback in _with_saved_attributes(callbacks):
        for name, value in states.get(key, {}).items():
            setattr(callback, name, value)
        if any(name.startswith(f"best/{key}/") for name in best_weights):
            callback.best_weights = [
                best_weights.get(f"best/{key}/{i}", weight)
                for i, weight in enumerate(model.get_weights())
            ]


def write_state(path, metadata, state):
    """Write a state file, so that `path` is the old or the new file whenever the process is killed.

    The file is written under another name, flushed to the disk (`fsync`) and then renamed.

    Args:
        path: `pathlib.Path` in a folder that exists.
        metadata: dict for JSON.
        state: dict `{name: Keras variable or array}`. Only one of them is copied at a time.

    Raises:
        OSError: If the file cannot be written. `path` is then unchanged.
    """
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(METADATA, json.dumps(metadata, default=float))
                for name, value in state.items():
                    _write_array(archive, name, as_array(value))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_state_metadata(path):
    """Read a state file completely, verify its checksums and return its metadata.

    Raises:
        ValueError: If the file is truncated or damaged.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                if damaged is None:
                    return json.loads(archive.read(METADATA))
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
        f"{path} is truncated or damaged ({damaged}). Delete it to start the run from the beginning"
    )


def read_state_arrays(path, *groups):
    """Yield `(name, array)` of the given groups from a file that `read_state_metadata` verified."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            if entry.partition("/")[0] in groups:
                yield _read_array(archive, entry)


def as_array(value):
    """Return the value of a variable or array as a NumPy array, which can share its memory."""
    value = value.value if isinstance(value, keras.Variable) else value
    return np.asarray(keras.ops.convert_to_numpy(value))


def _with_saved_attributes(callbacks):
    """Yield `("class number", attribute names, callback)` of callbacks with saved attributes."""
    attributes = CALLBACK_ATTRIBUTES | {
        type(callback): callback.kept for callback in callbacks if hasattr(callback, "kept")
    }
    for kind, names in attributes.items():
        instances = [callback for callback in callbacks if isinstance(callback, kind)]
        for number, callback in enumerate(instances):
            yield f"{kind.__name__} {number}", names, callback


def _dtype(variable):
    return keras.backend.standardize_dtype(variable.dtype)


def _write_array(archive, name, array):
    # The `.npy` format has no bfloat16. Its bits are stored as unsigned integers, and the name of
    # the entry ends with the dtype.
    bits = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
    with archive.open(f"{name}.{array.dtype.name}", "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, bits, allow_pickle=False)


def _read_array(archive, entry):
    name, _, dtype = entry.rpartition(".")
    with archive.open(entry) as file:
        return name, np.lib.format.read_array(file, allow_pickle=False).view(dtype)
