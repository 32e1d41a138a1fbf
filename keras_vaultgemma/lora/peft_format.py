"""A LoRA adapter outside of any model, and the files that PEFT keeps one in (https://github.com/huggingface/peft).

PEFT's linear layers have `lora_A.weight` [r, in] and `lora_B.weight` [out, r], the transposes of A and B here. Its
embedding has `lora_embedding_A` [r, V] and `lora_embedding_B` [D, r] and changes rows only; the tied head has a pair of
its own, so that both stand in a file twice.
"""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_vaultgemma._files import new_folder, read_json
from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, LazyTensor
from keras_vaultgemma.checkpoints.reader import check_shapes
from keras_vaultgemma.checkpoints.safetensors_format import open_safetensors, write_safetensors
from keras_vaultgemma.checkpoints.weight_map import Location

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

HARMLESS = {
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
    "revision",
    "target_modules",
    "task_type",
}
"""Fields of PEFT's config that are read here or change nothing once an adapter is trained."""


def _is_number(value):
    return type(value) in (int, float)


def _are_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


FIELDS = {
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "r": (
        "an integer from 1 to 2147483647",
        lambda value: type(value) is int and 0 < value < 2**31,
    ),
    "lora_alpha": (
        "a finite number above 0",
        lambda value: _is_number(value) and 0 < value <= sys.float_info.max,
    ),
    "lora_dropout": (
        "a number from 0 to below 1",
        lambda value: _is_number(value) and 0 <= value < 1,
    ),
    "bias": ("'none'", lambda value: value == "none"),
    "fan_in_fan_out": ("false", lambda value: not value),
    "init_lora_weights": (
        "one that leaves the base as it is: true, false, 'gaussian', 'orthogonal' or 'eva'",
        lambda value: type(value) is bool or value in ("gaussian", "orthogonal", "eva"),
    ),
    "target_modules": (
        "a list of names or a string",
        lambda value: isinstance(value, str) or _are_names(value),
    ),
    "exclude_modules": (
        "null, a list of names or a string",
        lambda value: value is None or isinstance(value, str) or _are_names(value),
    ),
    "layers_to_transform": (
        "null, an integer or a list of integers",
        lambda value: (
            value is None
            or type(value) is int
            or (isinstance(value, list) and all(type(i) is int for i in value))
        ),
    ),
}
"""What a field of PEFT's config may be here: in words, and as a test."""


class Adapter(NamedTuple):
    """Factors of some layers on the host.

    Attributes:
        rank: r.
        alpha: s times r, where a layer computes x W + s (x A) B.
        dropout: part of the adapter's input that is dropped in training.
        factors: `{path of the layer: (A, B)}`, NumPy float32 [in, r] and [r, out].
    """

    rank: int
    alpha: float
    dropout: float
    factors: dict


def write_adapter(folder, adapter, hyperparameters, base_model=None, ledger=None):
    """Write an adapter as PEFT does: whole, or not at all.

    Args:
        folder: made where it does not exist.
        adapter: `Adapter`.
        hyperparameters: of the backbone, as for `weight_layout.layout`.
        base_model: name or folder of the Hugging Face checkpoint that PEFT is to load it onto, or None to name none.
        ledger: `privacy.ledger.Ledger` of the model, written beside the adapter, or None.

    Raises:
        ValueError or OSError: where nothing can be written there.
    """
    weights = {
        path: weight
        for path, weight in _weights(hyperparameters).items()
        if path in adapter.factors
    }
    tensors = [
        (place, LazyTensor(value, Location("", value.shape, (0, 1)), value.shape))
        for path, weight in weights.items()
        for places, value in zip(
            _locations(weight, adapter.rank), adapter.factors[path], strict=True
        )
        for place in places
    ]
    modules = {place.name.removeprefix(PREFIX).partition(".lora_")[0] for place, _ in tensors}
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "ensure_weight_tying": EMBEDDING in modules,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": _shortened(modules, weights.keys(), hyperparameters),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    with new_folder(folder) as new:
        (new / CONFIG).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        write_safetensors(new / WEIGHTS, tensors, DTYPES["float32"])
        if ledger is not None:
            ledger.write(new)


def read_adapter(folder, hyperparameters):
    """Read an adapter that `write` or PEFT wrote.

    Everything is checked before any memory is taken. What PEFT saves of the embedding itself beside an adapter on it is
    not read.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        hyperparameters: of the backbone that it is for, as for `weight_layout.layout`.

    Returns:
        `Adapter`.

    Raises:
        ValueError: names the field of the config that is of another method or out of its range, the file that is
            missing, cut short or malformed, the tensor that is missing, unknown or of another shape (with both
            shapes), or an embedding whose head has other factors.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    tensors = open_safetensors(folder / WEIGHTS)
    chosen = {
        path: weight
        for path, weight in _weights(hyperparameters).items()
        if _is_chosen(_module(weight), config, tensors)
    }
    places = {path: _locations(weight, config["r"]) for path, weight in chosen.items()}
    expected = {
        place.name: place.shape for pair in places.values() for factor in pair for place in factor
    }
    if "token_embedding" in chosen:
        copies = {f"{PREFIX}{module}.base_layer.weight" for module in (EMBEDDING, HEAD)}
        expected |= dict.fromkeys(copies & tensors.keys(), chosen["token_embedding"].shape)
    check_shapes(folder, expected, tensors)
    if not chosen:
        _reject(
            folder / CONFIG,
            "target_modules",
            "names of layers that this model has",
            config["target_modules"],
        )
    return Adapter(
        config["r"],
        float(config["lora_alpha"]),
        float(config["lora_dropout"]),
        {
            path: tuple(_read_factor(folder, factor, tensors) for factor in pair)
            for path, pair in places.items()
        },
    )


def _read_config(path):
    """adapter_config.json with the defaults of PEFT's `LoraConfig`, checked."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    config = read_json(path)
    config = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        **config,
    }
    for field, (legal, is_fine) in FIELDS.items():
        if not is_fine(config.get(field)):
            _reject(path, field, legal, config.get(field))
    for field in sorted(config.keys() - HARMLESS):
        if config[field]:
            _reject(
                path,
                field,
                "absent, null, false or empty, for it changes what an adapter computes",
                config[field],
            )
    return config


def _reject(path, field, legal, value):
    raise ValueError(f"{path}: `{field}` must be {legal}. Received: {repr(value)[:200]}")


def _is_chosen(module, config, tensors):
    """Whether PEFT's config has an adapter on a module, such as model.layers.0.self_attn.q_proj."""
    targets, exceptions = config["target_modules"], config.get("exclude_modules") or []
    if isinstance(targets, str) or isinstance(exceptions, str):
        # A stranger's regular expression can run for ever: what is there was chosen.
        return any(name.startswith(f"{PREFIX}{module}.lora_") for name in tensors)
    layers, layer = config.get("layers_to_transform"), re.match(r"model\.layers\.(\d+)\.", module)
    layers = [layers] if isinstance(layers, int) else layers
    # What a whole name targets is not asked for its layer. The embedding is in none.
    if layers and module not in targets and not (layer and int(layer[1]) in layers):
        return False
    return _is_named(module, targets) and not _is_named(module, exceptions)


def _is_named(module, names):
    return any(module == name or module.endswith(f".{name}") for name in names)


def _weights(hyperparameters):
    """{layer's path: `Weight`} of every matrix, in the order of the layers."""
    weights = weight_map.weight_map(hyperparameters)
    return {weight.path.rpartition("/")[0]: weight for weight in weights if len(weight.shape) == 2}


def _locations(weight, rank):
    """Where A [in, r] stands in PEFT's file, and where B [r, out]: a list of places for each."""
    module = _module(weight)
    if module == EMBEDDING:
        width, units = weight.shape
        return (
            [
                Location(f"{PREFIX}{module}.lora_embedding_A", (rank, width), (1, 0)),
                Location(f"{PREFIX}{HEAD}.lora_B.weight", (width, rank), (0, 1)),
            ],
            [
                Location(f"{PREFIX}{module}.lora_embedding_B", (units, rank), (1, 0)),
                Location(f"{PREFIX}{HEAD}.lora_A.weight", (rank, units), (0, 1)),
            ],
        )
    units, width = weight.shape
    return (
        [Location(f"{PREFIX}{module}.lora_A.weight", (rank, width), (1, 0))],
        [Location(f"{PREFIX}{module}.lora_B.weight", (units, rank), (1, 0))],
    )


def _read_factor(folder, places, tensors):
    first, *others = places
    shape = tuple(first.shape[axis] for axis in first.axes)
    value = LazyTensor(tensors[first.name], first, shape).read("float32")
    for place in others:
        if not np.array_equal(LazyTensor(tensors[place.name], place, shape).read("float32"), value):
            raise ValueError(
                f"{folder}: {place.name} must be the transpose of {first.name}, for VaultGemma's head is tied to its "
                "embedding (`ensure_weight_tying=True` in PEFT)"
            )
    return value


def _shortened(modules, paths, hyperparameters):
    """`target_modules` of PEFT: names without their layer, where that means the same modules."""
    names = {module.rpartition(".")[2] for module in modules}
    means = {
        path
        for path, weight in _weights(hyperparameters).items()
        if _module(weight).rpartition(".")[2] in names
    }
    return sorted(names if means == set(paths) else modules)


def _module(weight):
    return weight.locations[weight_map.HUGGING_FACE].name.removesuffix(".weight")
