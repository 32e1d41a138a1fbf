"""The weights of a folder, in any of the three formats, for the backbone."""

import warnings
from pathlib import Path

import keras
from keras import ops

from keras_vaultgemma.checkpoints import presets, weight_map
from keras_vaultgemma.checkpoints.config import keras_policy, names_a_class, read_config
from keras_vaultgemma.checkpoints.hdf5_format import open_hdf5
from keras_vaultgemma.checkpoints.lazy_tensor import LazyTensor, equal_bits
from keras_vaultgemma.checkpoints.safetensors_format import open_tensors

WEIGHTS_FILE, SHARD_INDEX = "model.weights.h5", "model.weights.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class KerasOnly(ValueError):
    """A Keras preset that only Keras itself can load: it is quantized, or its weights are in several files."""


def format_of(folder):
    """Which of `weight_layout`'s formats a folder's config.json is of."""
    if not names_a_class(folder):
        return weight_map.HUGGING_FACE
    return weight_map.KERAS if presets.is_keras(folder) else weight_map.KERAS_HUB


def open_values(folder):
    """The weights of a folder, checked and not yet read.

    Args:
        folder: of a Hugging Face checkpoint (model.safetensors, or several files and their index), a keras-hub
            `GemmaBackbone` preset or a Keras preset of this package (model.weights.h5).

    Returns:
        (hyperparameters, `{path of the backbone's variable: StoredTensor}` in the order of the layers). The
        hyperparameters are the backbone's constructor arguments, without `dtype`, `name` and `trainable`.

    Raises:
        KerasOnly: for a Keras preset that is quantized or whose weights are in several files.
        ValueError: names the field of config.json, the file that is cut short or malformed, the tensor that is missing,
            unknown or of another shape (with both shapes), or an `lm_head.weight` that is not the embedding.
    """
    folder = Path(folder)
    hyperparameters = read_config(folder)
    layout_format = format_of(folder)
    if layout_format == weight_map.HUGGING_FACE:
        tensors = open_tensors(folder)
    else:
        if layout_format == weight_map.KERAS:
            _check_that_it_is_plain(folder)
        tensors = open_hdf5(folder / WEIGHTS_FILE)
    head = tensors.pop(HEAD, None) if layout_format == weight_map.HUGGING_FACE else None
    weights = weight_map.weight_map(hyperparameters)
    places = {weight.path: weight.locations[layout_format] for weight in weights}
    _check_head(folder, head, tensors.get(EMBEDDING))
    check_shapes(folder, {place.name: place.shape for place in places.values()}, tensors)
    return hyperparameters, {
        weight.path: LazyTensor(
            tensors[places[weight.path].name], places[weight.path], weight.shape
        )
        for weight in weights
    }


def load_weights(backbone, folder):
    """Read the weights of a folder into a backbone, cast to its dtype.

    Everything is checked before the first variable changes; then one tensor after the other is read.

    Args:
        backbone: `VaultGemmaBackbone` of the folder's configuration.
        folder: as for `open_values`.

    Raises:
        ValueError: as `open_values` does; and names the variable that is of another shape or quantized.
    """
    _, values = open_values(folder)
    variables = {variable.path: variable for variable in backbone.weights}
    for path, variable in variables.items():
        if not keras.backend.is_float_dtype(variable.dtype):
            raise ValueError(
                f"A checkpoint loads into floating-point variables; quantize the model afterwards. Received: "
                f"{path} of dtype {variable.dtype}"
            )
    for path, value in values.items():
        shape = tuple(variables[path].shape) if path in variables else None
        if shape != value.shape:
            raise ValueError(
                f"{path} is misshapen in {folder}. Expected shape: {shape}. Found: {value.shape}"
            )
    layers = {path.rpartition("/")[0] for path in values}
    for path in sorted(
        path for path in variables.keys() - values.keys() if path.rpartition("/")[0] not in layers
    ):
        raise ValueError(
            f"{path} is missing from {folder}. Expected shape: {tuple(variables[path].shape)}. Found: None"
        )
    for path, value in values.items():
        variables[path].assign(value.read(variables[path].dtype))


def warn_if_not_finite(backbone, values=None):
    """Warn where weights hold NaN or infinity, naming the first variable that does.

    Args:
        backbone: `VaultGemmaBackbone`.
        values: `{path of the variable: StoredTensor}` that the backbone was filled with, which know; None to look at
            the variables.
    """
    for variable in backbone.variables:
        if "float" not in variable.dtype:
            continue
        if not (_is_finite(variable.value) if values is None else values[variable.path].is_finite):
            warnings.warn(
                f"{variable.path} holds NaN or infinite values: the checkpoint is damaged, or too large for "
                f"{variable.dtype}",
                stacklevel=3,
            )
            return


def _is_finite(value):
    # NaN or infinity cannot leave a sum finite, and a sum takes no memory; but it can overflow where all is well.
    return bool(ops.isfinite(ops.sum(value))) or bool(ops.all(ops.isfinite(value)))


def _check_that_it_is_plain(folder):
    policy = keras_policy(folder)
    if policy is None:
        raise KerasOnly(
            f"{folder / presets.CONFIG}: `dtype` must be one floating-point policy, not a quantized one"
        )
    if not (folder / WEIGHTS_FILE).is_file() and (folder / SHARD_INDEX).is_file():
        raise KerasOnly(
            f"{folder} must have its weights in one file, {WEIGHTS_FILE}. Received: several, listed in {SHARD_INDEX}"
        )


def check_shapes(folder, shapes, tensors):
    """Raise ValueError for the first of `tensors` that is missing, unknown or of another shape than in `shapes`."""
    for name in sorted(shapes.keys() | tensors.keys()):
        expected = shapes.get(name)
        found = tensors[name].shape if name in tensors else None
        if expected != found:
            problem = (
                "is missing from"
                if found is None
                else "is unknown in"
                if expected is None
                else "is misshapen in"
            )
            raise ValueError(
                f"{name} {problem} {folder}. Expected shape: {expected}. Found: {found}"
            )


def _check_head(folder, head, embedding):
    """Refuse a head of its own: a tied one, stored twice, is the embedding bit by bit (NaN included)."""
    if head is None or embedding is None or equal_bits(head, embedding):
        return
    raise ValueError(
        f"{folder}: {HEAD} must be equal to {EMBEDDING}, for VaultGemma's head is tied to its embedding. Received: "
        f"{head.dtype} {head.shape} and {embedding.dtype} {embedding.shape}, which differ"
    )
