"""The `adapter_config.json` of PEFT: which values are supported, and which modules it targets."""

import math
import re
import sys

from keras_vaultgemma._files import read_json

PREFIX = "base_model.model."
"""Prefix of every module's name in PEFT's files."""

SUPPORTED_FIELDS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Fields that are read here, or do not change what a trained adapter computes."""

DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "init_lora_weights": True,
}
"""Defaults of PEFT's `LoraConfig`."""


def _is_number(value):
    return type(value) in (int, float)


def _is_list_of(type_, value):
    return isinstance(value, list) and all(type(item) is type_ for item in value)


def _is_rank(value):
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value):
    return _is_number(value) and 0 < value <= sys.float_info.max


def _is_pattern(text):
    """Return True if a regular expression from a stranger's file takes little time to match."""
    is_short = re.fullmatch(r"[\w.^$|()\[\]\\*+?-]{1,200}", text)
    is_costly = re.search(r"\)[*+?]|\(\?|\\[1-9]", text) or len(re.findall(r"[*+?]", text)) > 2
    if not is_short or is_costly or text.count("|") > 8:
        return False
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_dict_of(is_legal, value):
    return value is None or (
        isinstance(value, dict)
        and all(map(_is_pattern, value))
        and all(map(is_legal, value.values()))
    )


PATTERNS = "null or an object from names, or expressions with at most two of * + ?, to "
"""What `rank_pattern` and `alpha_pattern` must be."""

LEGAL_VALUES = {
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "r": (
        "an integer from 1 to 2147483647",
        _is_rank,
    ),
    "lora_alpha": (
        "a finite number above 0",
        _is_alpha,
    ),
    "rank_pattern": (
        f"{PATTERNS}integers above 0",
        lambda value: _is_dict_of(_is_rank, value),
    ),
    "alpha_pattern": (
        f"{PATTERNS}finite numbers above 0",
        lambda value: _is_dict_of(_is_alpha, value),
    ),
    "use_rslora": ("true, false or null", lambda value: value in (True, False, None)),
    "lora_dropout": (
        "a number in [0, 1)",
        lambda value: _is_number(value) and 0 <= value < 1,
    ),
    "bias": ("'none'", lambda value: value == "none"),
    "fan_in_fan_out": ("false", lambda value: not value),
    "init_lora_weights": (
        "true, false, 'gaussian', 'orthogonal' or 'eva', which do not change the base weights",
        lambda value: type(value) is bool or value in ("gaussian", "orthogonal", "eva"),
    ),
    "target_modules": (
        "a list of names or a string",
        lambda value: isinstance(value, str) or _is_list_of(str, value),
    ),
    "exclude_modules": (
        "null, a list of names or a string",
        lambda value: value is None or isinstance(value, str) or _is_list_of(str, value),
    ),
    "layers_to_transform": (
        "null, an integer or a list of integers",
        lambda value: value is None or type(value) is int or _is_list_of(int, value),
    ),
}
"""`{field: (description of its legal values, function that checks a value)}`."""


def read_config(path):
    """Read `adapter_config.json`, add PEFT's defaults and check every field.

    Args:
        path: `pathlib.Path` of the file.

    Returns:
        Dict of the fields.

    Raises:
        ValueError: If the file is missing or malformed, or a field has a value that this package
            does not support.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    config = {**DEFAULTS, **read_json(path)}
    for field, (legal, is_legal) in LEGAL_VALUES.items():
        if not is_legal(config.get(field)):
            raise unsupported(path, field, legal, config.get(field))
    for field in sorted(config.keys() - SUPPORTED_FIELDS):
        if config[field]:
            legal = "absent, null, false or empty, because it changes what an adapter computes"
            raise unsupported(path, field, legal, config[field])
    return config


def unsupported(path, field, legal, value):
    """Return the ValueError for a field of the config whose value is not legal."""
    return ValueError(f"{path}: `{field}` must be {legal}. Received: {repr(value)[:200]}")


def is_target(module, config, tensors):
    """Return True if a module, such as `model.layers.0.self_attn.q_proj`, has an adapter.

    Args:
        module: string. Name of the module in Hugging Face's model.
        config: dict that `read_config` returned.
        tensors: dict whose keys are the names of the tensors in the adapter's weights file.
    """
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if isinstance(targets, str) or isinstance(excluded, str):
        # A string is a regular expression. Look at the tensors instead of matching it, because an
        # expression from an untrusted file can take unbounded time.
        return any(name.startswith(f"{PREFIX}{module}.lora_") for name in tensors)
    layers, layer = config.get("layers_to_transform"), re.match(r"model\.layers\.(\d+)\.", module)
    layers = [layers] if isinstance(layers, int) else layers
    # PEFT ignores `layers_to_transform` for a module that is targeted by its whole name. The
    # embedding belongs to no layer.
    if layers and module not in targets and not (layer and int(layer[1]) in layers):
        return False
    return _matches(module, targets) and not _matches(module, excluded)


def rank_and_alpha(module, config):
    """Return the rank r of a module and the alpha of the scale `alpha / r`.

    Rank-stabilised LoRA has the scale `alpha / sqrt(r)`, which is that of another alpha.

    Args:
        module: string. Name of the module in Hugging Face's model.
        config: dict that `read_config` returned.
    """
    rank = _first_match(module, config.get("rank_pattern"), config["r"])
    alpha = _first_match(module, config.get("alpha_pattern"), config["lora_alpha"])
    return rank, float(alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)


def _first_match(module, pattern, default):
    """Return the value of the first expression that matches the end of a module's name."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", module):
            return value
    return default


def _matches(module, names):
    return any(module == name or module.endswith(f".{name}") for name in names)
