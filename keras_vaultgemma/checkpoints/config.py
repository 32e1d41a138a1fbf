"""The config.json of a checkpoint, read as constructor arguments of the backbone."""

import warnings
from pathlib import Path

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.config_fields import (
    COUNT,
    GEMMA_FIELDS,
    GEMMA_TYPE,
    HUGGING_FACE_FIELDS,
    KERAS,
    KERAS_FIELDS,
    KERAS_HUB,
    KERAS_HUB_FIELDS,
    MODEL_TYPE,
    NUMBER,
    is_count,
    is_number,
)
from keras_vaultgemma.checkpoints.foreign_files import QUANTIZED
from keras_vaultgemma.layers.hyperparameters import LAYER_TYPES


def read_config(folder):
    """Read the hyperparameters of a backbone from the config.json of a folder.

    Absent fields take the defaults of the library that wrote the file: those of transformers'
    `VaultGemmaConfig` (which are not the values of VaultGemma 1B), of keras-hub's `GemmaBackbone`
    or of this package's `VaultGemmaBackbone`.

    Args:
        folder: `pathlib.Path` or string.

    Returns:
        Dict of all constructor arguments of the backbone but `dtype`, `name` and `trainable`.

    Raises:
        ValueError: If a field belongs to another model, is out of range or has the wrong type. The
            message names the file and the field.
    """
    path = Path(folder) / presets.CONFIG
    config = read_json(path)
    if "registered_name" not in config:
        arguments = _hugging_face(path, config)
    else:
        arguments = (_keras if config["registered_name"] == KERAS else _keras_hub)(path, config)
    heads, groups = arguments["num_query_heads"], arguments["num_key_value_heads"]
    if heads % groups:
        _reject(
            path, "num_query_heads", f"a multiple of the number of key-value heads, {groups}", heads
        )
    if arguments["head_dim"] % 2:
        _reject(
            path,
            "head_dim",
            "even, because rotary embeddings rotate pairs of channels",
            arguments["head_dim"],
        )
    return {argument: arguments[argument] for argument in KERAS_FIELDS}


def keras_policy(folder):
    """Return the name of the dtype policy of a Keras preset.

    Args:
        folder: `pathlib.Path` or string.

    Returns:
        String, or None for a map of policies or a quantized policy.

    Raises:
        ValueError: If `dtype` is nothing that Keras writes.
    """
    path = Path(folder) / presets.CONFIG
    policy = _class_config(path, read_json(path)).get("dtype", "float32")
    if isinstance(policy, dict):
        if policy.get("class_name") != "DTypePolicy" or not isinstance(policy.get("config"), dict):
            return None
        policy = policy["config"].get("name")
    if not isinstance(policy, str):
        _reject(path, "dtype", "the name of a dtype policy", policy)
    return policy


def _hugging_face(path, config):
    is_gemma = config.get("model_type") == GEMMA_TYPE
    if not is_gemma and config.get("model_type") != MODEL_TYPE:
        _reject(path, "model_type", f"{MODEL_TYPE!r} or {GEMMA_TYPE!r}", config.get("model_type"))
    for field in ("quantization_config", "compression_config"):
        if quantization := config.get(field):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise ValueError(
                f"{path}: this checkpoint is quantized, by {method or 'an unnamed method'} "
                f"(`{field}`). {QUANTIZED}"
            )
    arguments = _read(path, config, GEMMA_FIELDS if is_gemma else HUGGING_FACE_FIELDS)
    if config.get("attention_dropout"):
        warnings.warn(
            f"{path}: `attention_dropout` is ignored, because this implementation trains without "
            "dropout",
            stacklevel=4,
        )

    if is_gemma:
        arguments = _with_defaults(arguments)
    elif arguments["layer_types"] is None:  # The default of transformers.
        arguments["layer_types"] = _alternating(arguments["num_layers"])
    _check_layers(path, arguments, "num_hidden_layers", "sliding_window")

    # transformers prefers the older name where a file has both.
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    fine = isinstance(rope, dict) and rope.keys() <= {"rope_type", "type", "rope_theta"}
    if not fine or rope.get("rope_type", rope.get("type", "default")) != "default":
        _reject(
            path, field, "null, or of the rope_type 'default' with no more than a rope_theta", rope
        )
    arguments["rope_theta"] = theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if not is_number(theta):
        _reject(path, "rope_theta", NUMBER[0], theta)
    return arguments


def _keras_hub(path, config):
    if config["registered_name"] != KERAS_HUB:
        _reject(path, "registered_name", repr(KERAS_HUB), config["registered_name"])
    config = _class_config(path, config)
    arguments = _read(path, config, KERAS_HUB_FIELDS)
    arguments["intermediate_dim"] //= 2  # keras-hub counts both branches of the gated MLP.
    if config.get("use_sliding_window_attention"):
        arguments["layer_types"] = _alternating(arguments["num_layers"])
    return _with_defaults(arguments)


def _keras(path, config):
    config = _class_config(path, config)
    unknown = sorted(config.keys() - KERAS_FIELDS.keys() - {"name", "trainable", "dtype"})
    if unknown:
        _reject(
            path,
            unknown[0],
            "absent, because the backbone has no such argument",
            config[unknown[0]],
        )
    arguments = _with_defaults(_read(path, config, KERAS_FIELDS))
    _check_layers(path, arguments, "num_layers", "sliding_window_size")
    return arguments


def _with_defaults(arguments):
    """Return the arguments with the backbone's defaults for those that are absent or None."""
    arguments = {**{name: default for name, (_, default, _) in KERAS_FIELDS.items()}, **arguments}
    if arguments["query_pre_attn_scalar"] is None:
        arguments["query_pre_attn_scalar"] = arguments["head_dim"]
    if arguments["layer_types"] is None:
        arguments["layer_types"] = ["full_attention"] * arguments["num_layers"]
    return arguments


def _class_config(path, config):
    if not isinstance(config.get("config"), dict):
        _reject(path, "config", "an object", config.get("config"))
    return config["config"]


def _check_layers(path, arguments, count_field, window_field):
    count, types, window = (
        arguments[name] for name in ("num_layers", "layer_types", "sliding_window_size")
    )
    if (
        not isinstance(types, list)
        or len(types) != count
        or not all(name in LAYER_TYPES for name in types)
    ):
        legal = (
            f"null or a list of {count} (`{count_field}`) of {' and '.join(map(repr, LAYER_TYPES))}"
        )
        _reject(path, "layer_types", legal, types)
    if not is_count(window) and (window is not None or "sliding_attention" in types):
        _reject(path, window_field, COUNT[0] + ", or null if no layer slides", window)


def _alternating(count):
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]


def _read(path, config, fields):
    """Check every field. Return those that are arguments of the backbone."""
    arguments = {}
    for field, (argument, default, (legal, is_fine)) in fields.items():
        value = config.get(field, default)
        if not is_fine(value):
            _reject(path, field, legal, value)
        if argument is not None:
            arguments[argument] = value
    return arguments


def _reject(path, field, legal, value):
    raise ValueError(f"{path}: `{field}` must be {legal}. Received: {repr(value)[:200]}")
