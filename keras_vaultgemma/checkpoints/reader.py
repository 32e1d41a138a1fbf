"""The weights of a checkpoint folder, in any of the formats of `weight_map`."""

import warnings
from pathlib import Path

from keras import ops

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import presets, weight_map
from keras_vaultgemma.checkpoints.config import keras_policy, read_config
from keras_vaultgemma.checkpoints.config_fields import GEMMA_TYPE
from keras_vaultgemma.checkpoints.hdf5_format import open_hdf5
from keras_vaultgemma.checkpoints.lazy_tensor import LazyTensor, equal_bits
from keras_vaultgemma.checkpoints.safetensors_format import open_tensors

WEIGHTS_FILE, SHARD_INDEX = "model.weights.h5", "model.weights.json"
PREFIX = "model."
EMBEDDING, HEAD = f"{PREFIX}embed_tokens.weight", "lm_head.weight"


class KerasOnly(ValueError):
    """Error for a Keras preset that only Keras can load: it is quantized or sharded."""


def format_of(folder):
    """Return the format of `weight_map` that the config.json of a folder belongs to."""
    if not presets.names_a_class(folder):
        is_gemma = read_json(Path(folder) / presets.CONFIG).get("model_type") == GEMMA_TYPE
        return weight_map.GEMMA if is_gemma else weight_map.HUGGING_FACE
    return weight_map.KERAS if presets.is_keras(folder) else weight_map.KERAS_HUB


def open_values(folder):
    """Check all weights of a folder against its config, without reading them.

    Args:
        folder: `pathlib.Path` or string. A Hugging Face checkpoint of VaultGemma or of Gemma 1
            (model.safetensors, or several files and their index), a keras-hub `GemmaBackbone`
            preset or a Keras preset of this package (model.weights.h5).

    Returns:
        Tuple `(hyperparameters, values)`. `hyperparameters` is a dict of the backbone's constructor
        arguments without `dtype`, `name` and `trainable`. `values` is a dict of the variables'
        paths to `LazyTensor`, in the order of the layers.

    Raises:
        KerasOnly: If a Keras preset is quantized or has its weights in several files.
        ValueError: If config.json describes no VaultGemma, a file is truncated or malformed, a
            tensor is missing, unknown or of another shape (the message has both shapes), or
            `lm_head.weight` differs from the embedding.
    """
    folder = Path(folder)
    hyperparameters = read_config(folder)
    file_format = format_of(folder)
    if file_format in weight_map.SAFETENSORS:
        tensors = _with_prefix(open_tensors(folder))
    else:
        if file_format == weight_map.KERAS:
            _check_plain_preset(folder)
        tensors = open_hdf5(folder / WEIGHTS_FILE)
    head = tensors.pop(HEAD, None) if file_format in weight_map.SAFETENSORS else None
    weights = weight_map.weight_map(hyperparameters)
    locations = {weight.path: weight.locations[file_format] for weight in weights}
    _check_head(folder, head, tensors.get(EMBEDDING))
    shapes = {location.name: location.shape for location in locations.values()}
    check_shapes(folder, shapes, tensors)
    return hyperparameters, {
        weight.path: LazyTensor(
            tensors[locations[weight.path].name], locations[weight.path], weight.shape
        )
        for weight in weights
    }


def warn_if_not_finite(backbone, values=None):
    """Warn if weights hold NaN or infinity, and name the first such variable.

    Args:
        backbone: `VaultGemmaBackbone`.
        values: dict of the variables' paths to the `LazyTensor` that each was read from, which
            knows whether it is finite. Defaults to None, which inspects the variables themselves.
    """
    for variable in backbone.variables:
        if "float" not in variable.dtype:
            continue
        if not (_is_finite(variable.value) if values is None else values[variable.path].is_finite):
            warnings.warn(
                f"{variable.path} holds NaN or infinite values: the checkpoint is damaged, or its "
                f"values are out of range for {variable.dtype}",
                stacklevel=3,
            )
            return


def check_shapes(folder, shapes, tensors):
    """Raise ValueError for the first tensor that is missing, unknown or of another shape.

    Args:
        folder: `pathlib.Path` or string, for the message.
        shapes: dict of names to expected shapes.
        tensors: dict of names to arrays.
    """
    for name in sorted(shapes.keys() | tensors.keys()):
        expected = shapes.get(name)
        found = tensors[name].shape if name in tensors else None
        if expected == found:
            continue
        if found is None:
            problem = "is missing from"
        elif expected is None:
            problem = "is unknown in"
        else:
            problem = "is misshapen in"
        raise ValueError(f"{name} {problem} {folder}. Expected shape: {expected}. Found: {found}")


def _is_finite(value):
    # A sum with a NaN or infinite term is never finite, and it needs no memory. Only a sum of
    # finite values that overflows needs the second test.
    return bool(ops.isfinite(ops.sum(value))) or bool(ops.all(ops.isfinite(value)))


def _with_prefix(tensors):
    """Return the tensors by the names that `AutoModelForCausalLM` gives them.

    `AutoModel`, the model without its head, saves the same tensors without the prefix.
    """
    if any(name.startswith(PREFIX) for name in tensors):
        return tensors
    return {name if name == HEAD else PREFIX + name: value for name, value in tensors.items()}


def _check_plain_preset(folder):
    policy = keras_policy(folder)
    if policy is None:
        raise KerasOnly(
            f"{folder / presets.CONFIG}: `dtype` must be one floating-point policy, not a "
            "quantized one"
        )
    if not (folder / WEIGHTS_FILE).is_file() and (folder / SHARD_INDEX).is_file():
        raise KerasOnly(
            f"{folder} must have its weights in one file, {WEIGHTS_FILE}. "
            f"Received: several, listed in {SHARD_INDEX}"
        )


def _check_head(folder, head, embedding):
    """Raise ValueError for a stored head that is not the embedding, bit by bit."""
    if head is None or embedding is None or equal_bits(head, embedding):
        return
    raise ValueError(
        f"{folder}: {HEAD} must be equal to {EMBEDDING}, because VaultGemma's head is tied to its "
        f"embedding. Received: {head.dtype} {head.shape} and {embedding.dtype} {embedding.shape}, "
        "which differ"
    )
