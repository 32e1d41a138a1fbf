"""The config.json of a checkpoint that another library wrote, as the backbone's constructor arguments."""

import sys
import warnings
from pathlib import Path

from keras_vaultgemma import presets

MODEL_TYPE = "vaultgemma"
ACTIVATION = "gelu_pytorch_tanh"
KERAS_HUB = "keras_hub>GemmaBackbone"
LAYER_TYPES = ("full_attention", "sliding_attention")


def _is_count(value):
    return type(value) is int and 0 < value < 2**31


def _is_number(value):
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


COUNT = ("an integer from 1 to 2147483647", _is_count)
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
"""What a field may be: in words, and as a test."""

HUGGING_FACE_FIELDS = {
    "vocab_size": ("vocabulary_size", 256000, COUNT),
    "num_hidden_layers": ("num_layers", 26, COUNT),
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
"""Field: the backbone's argument, transformers' default where the file leaves it out, what it may be."""

KERAS_HUB_FIELDS = {
    "vocabulary_size": ("vocabulary_size", None, COUNT),
    "num_layers": ("num_layers", None, COUNT),
    "num_query_heads": ("num_query_heads", None, COUNT),
    "num_key_value_heads": ("num_key_value_heads", None, COUNT),
    "hidden_dim": ("hidden_dim", None, COUNT),
    "intermediate_dim": ("intermediate_dim", None, ("an even integer above 0", lambda v: _is_count(v) and v % 2 == 0)),
    "head_dim": ("head_dim", None, COUNT),
    "attention_logit_soft_cap": ("attention_logit_soft_cap", None, CAP),
    "final_logit_soft_cap": ("final_logit_soft_cap", None, CAP),
    "use_sliding_window_attention": (None, False, FLAG),
    "sliding_window_size": ("sliding_window_size", 4096, COUNT),
    "use_post_ffw_norm": (None, False, FALSE),
    "use_post_attention_norm": (None, False, FALSE),
    "dropout": (None, 0, ("0", lambda value: value == 0)),
    # What keras-hub's blocks compute with, whatever these two fields say; another value says that the weights were
    # made for another model than the one keras-hub runs.
    "query_head_dim_normalize": (None, True, TRUE),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6, ("1e-6", lambda value: value == 1e-6)),
}
"""As above, for keras-hub's `GemmaBackbone`."""


def read_config(folder):
    """The backbone's constructor arguments from the config.json of a Hugging Face or keras-hub folder.

    Fields that are missing take the defaults of transformers' `VaultGemmaConfig`, which are not those of VaultGemma 1B,
    or of keras-hub's `GemmaBackbone`.

    Raises:
        ValueError: names the file and the field that is of another model, out of its range or of the wrong type.
    """
    path = Path(folder) / presets.CONFIG
    config = presets.read_json(path)
    return (_keras_hub if _names_a_class(config) else _hugging_face)(path, config)


def is_keras_hub(folder):
    """Whether a folder is in keras-hub's format, in which a config names a class, and not in Hugging Face's."""
    return _names_a_class(presets.read_json(Path(folder) / presets.CONFIG))


def _names_a_class(config):
    return "registered_name" in config


def _hugging_face(path, config):
    if config.get("model_type") != MODEL_TYPE:
        _refuse(path, "model_type", repr(MODEL_TYPE), config.get("model_type"))
    arguments = _read(path, config, HUGGING_FACE_FIELDS)
    if config.get("attention_dropout"):
        warnings.warn(f"{path}: `attention_dropout` is ignored; training here has no dropout", stacklevel=4)

    count = arguments["num_layers"]
    types = arguments["layer_types"]
    if types is None:  # transformers alternates, sliding first
        arguments["layer_types"] = types = _alternating(count)
    if not isinstance(types, list) or len(types) != count or not all(name in LAYER_TYPES for name in types):
        legal = f"null or a list of {count} (`num_hidden_layers`) of {' and '.join(map(repr, LAYER_TYPES))}"
        _refuse(path, "layer_types", legal, types)
    window = arguments["sliding_window_size"]
    if not _is_count(window) and (window is not None or "sliding_attention" in types):
        _refuse(path, "sliding_window", COUNT[0] + ", or null where no layer slides", window)

    # transformers reads the older name first where both are there.
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    fine = isinstance(rope, dict) and rope.keys() <= {"rope_type", "type", "rope_theta"}
    if not fine or rope.get("rope_type", rope.get("type", "default")) != "default":
        _refuse(path, field, "null, or of the rope_type 'default' with no more than a rope_theta", rope)
    arguments["rope_theta"] = theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if not _is_number(theta):
        _refuse(path, "rope_theta", NUMBER[0], theta)
    return arguments


def _keras_hub(path, config):
    if config["registered_name"] != KERAS_HUB:
        _refuse(path, "registered_name", repr(KERAS_HUB), config["registered_name"])
    config = config.get("config")
    if not isinstance(config, dict):
        _refuse(path, "config", "an object", config)
    arguments = _read(path, config, KERAS_HUB_FIELDS)
    arguments["intermediate_dim"] //= 2  # keras-hub counts both branches of the gated MLP together
    if config.get("use_sliding_window_attention"):
        arguments["layer_types"] = _alternating(arguments["num_layers"])
    return arguments


def _alternating(count):
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]


def _read(path, config, fields):
    """Check every field, and return those that are arguments of the backbone."""
    arguments = {}
    for field, (argument, default, (legal, is_fine)) in fields.items():
        value = config.get(field, default)
        if not is_fine(value):
            _refuse(path, field, legal, value)
        if argument is not None:
            arguments[argument] = value
    return arguments


def _refuse(path, field, legal, value):
    raise ValueError(f"{path}: `{field}` must be {legal}. Received: {repr(value)[:200]}")
