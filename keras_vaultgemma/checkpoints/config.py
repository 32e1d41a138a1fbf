"""The config.json of a checkpoint, read as constructor arguments of the backbone."""

import sys
import warnings
from pathlib import Path

from keras_vaultgemma._files import read_json
from keras_vaultgemma._validation import is_integer
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.foreign_files import QUANTIZED
from keras_vaultgemma.layers.hyperparameters import LAYER_TYPES

MODEL_TYPE = "vaultgemma"
ACTIVATION = "gelu_pytorch_tanh"
KERAS_HUB = "keras_hub>GemmaBackbone"
KERAS = "keras_vaultgemma>VaultGemmaBackbone"


def _is_count(value):
    return is_integer(value, maximum=2**31 - 1)


def _is_number(value):
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


COUNT = ("an integer from 1 to 2147483647", _is_count)
LAYERS = ("an integer from 1 to 1000", lambda value: is_integer(value, maximum=1000))
"""Bounds the memory that `layer_types` and the weight map take for a hostile config."""

NUMBER = ("a finite number above 0", _is_number)
CAP = ("null or a finite number above 0", lambda value: value is None or _is_number(value))
RATE = (
    "null or a number from 0 to 1",
    lambda value: value is None or (type(value) in (int, float) and 0 <= value <= 1),
)
FLAG = ("true or false", lambda value: type(value) is bool)
TRUE = ("true", lambda value: value is True)
FALSE = ("false", lambda value: value is False)
ANY = ("", lambda value: True)
"""Legal values of a field: the words of the error message, and a predicate."""

HUGGING_FACE_FIELDS = {
    "vocab_size": ("vocabulary_size", 256000, COUNT),
    "num_hidden_layers": ("num_layers", 26, LAYERS),
    "num_attention_heads": ("num_query_heads", 8, COUNT),
    "num_key_value_heads": ("num_key_value_heads", 4, COUNT),
    "hidden_size": ("hidden_dim", 2304, COUNT),
    "intermediate_size": ("intermediate_dim", 9216, COUNT),
    "head_dim": ("head_dim", 256, COUNT),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256, NUMBER),
    "attn_logit_softcapping": ("attention_logit_soft_cap", 50.0, CAP),
    "final_logit_softcapping": ("final_logit_soft_cap", 30.0, CAP),
    "layer_types": ("layer_types", None, ANY),
    "sliding_window": ("sliding_window_size", 4096, ANY),
    "rms_norm_eps": ("layer_norm_epsilon", 1e-6, NUMBER),
    "max_position_embeddings": ("max_sequence_length", 8192, COUNT),
    "initializer_range": ("initializer_range", 0.02, NUMBER),
    "hidden_activation": (None, ACTIVATION, (repr(ACTIVATION), lambda value: value == ACTIVATION)),
    "attention_bias": (None, False, FALSE),
    "tie_word_embeddings": (None, True, TRUE),
    "attention_dropout": (None, 0.0, RATE),
}
"""Fields of Hugging Face's config.json.

Each maps to the backbone's argument (None if it has none), the default that transformers uses for
an absent field, and the legal values."""

KERAS_HUB_FIELDS = {
    "vocabulary_size": ("vocabulary_size", None, COUNT),
    "num_layers": ("num_layers", None, LAYERS),
    "num_query_heads": ("num_query_heads", None, COUNT),
    "num_key_value_heads": ("num_key_value_heads", None, COUNT),
    "hidden_dim": ("hidden_dim", None, COUNT),
    "intermediate_dim": (
        "intermediate_dim",
        None,
        ("an even integer above 0", lambda v: _is_count(v) and v % 2 == 0),
    ),
    "head_dim": ("head_dim", None, COUNT),
    "attention_logit_soft_cap": ("attention_logit_soft_cap", None, CAP),
    "final_logit_soft_cap": ("final_logit_soft_cap", None, CAP),
    "use_sliding_window_attention": (None, False, FLAG),
    "sliding_window_size": ("sliding_window_size", 4096, COUNT),
    "use_post_ffw_norm": (None, False, FALSE),
    "use_post_attention_norm": (None, False, FALSE),
    "dropout": (None, 0, ("0", lambda value: value == 0)),
    # keras-hub's blocks ignore these two fields and compute with the values below. Another value
    # means that the weights belong to a model that keras-hub does not run.
    "query_head_dim_normalize": (None, True, TRUE),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6, ("1e-6", lambda value: value == 1e-6)),
}
"""Fields of keras-hub's `GemmaBackbone`, in the same form."""

KERAS_FIELDS = {
    "vocabulary_size": ("vocabulary_size", None, COUNT),
    "num_layers": ("num_layers", None, LAYERS),
    "num_query_heads": ("num_query_heads", None, COUNT),
    "num_key_value_heads": ("num_key_value_heads", None, COUNT),
    "hidden_dim": ("hidden_dim", None, COUNT),
    "intermediate_dim": ("intermediate_dim", None, COUNT),
    "head_dim": ("head_dim", None, COUNT),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", None, CAP),
    "attention_logit_soft_cap": ("attention_logit_soft_cap", None, CAP),
    "final_logit_soft_cap": ("final_logit_soft_cap", None, CAP),
    "layer_types": ("layer_types", None, ANY),
    "sliding_window_size": ("sliding_window_size", None, ANY),
    "rope_theta": ("rope_theta", 10_000.0, NUMBER),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6, NUMBER),
    "max_sequence_length": ("max_sequence_length", 1024, COUNT),
    "initializer_range": ("initializer_range", 0.02, NUMBER),
}
"""Fields of this package's presets, in the same form, with the defaults of the backbone."""


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
    if config.get("model_type") != MODEL_TYPE:
        _reject(path, "model_type", repr(MODEL_TYPE), config.get("model_type"))
    for field in ("quantization_config", "compression_config"):
        if quantization := config.get(field):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise ValueError(
                f"{path}: this checkpoint is quantized, by {method or 'an unnamed method'} "
                f"(`{field}`). {QUANTIZED}"
            )
    arguments = _read(path, config, HUGGING_FACE_FIELDS)
    if config.get("attention_dropout"):
        warnings.warn(
            f"{path}: `attention_dropout` is ignored, because this implementation trains without "
            "dropout",
            stacklevel=4,
        )

    if arguments["layer_types"] is None:  # The default of transformers.
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
    if not _is_number(theta):
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
    if not _is_count(window) and (window is not None or "sliding_attention" in types):
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
