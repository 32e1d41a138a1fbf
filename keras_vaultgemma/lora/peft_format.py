"""Read and write LoRA adapters in the file format of PEFT (https://github.com/huggingface/peft).

PEFT stores the transposes of the factors A `[in, r]` and B `[r, out]`: `lora_A.weight` is `[r, in]`
and `lora_B.weight` is `[out, r]`. For the embedding it stores `lora_embedding_A` `[r, V]` and
`lora_embedding_B` `[D, r]`, which change only the embedding's rows. The tied head has a pair of its
own, so that a file contains the embedding's factors twice.
"""

import json
from pathlib import Path

import numpy as np

from keras_vaultgemma._files import new_folder
from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, LazyTensor
from keras_vaultgemma.checkpoints.reader import check_shapes
from keras_vaultgemma.checkpoints.safetensors_format import open_safetensors, write_safetensors
from keras_vaultgemma.checkpoints.weight_map import Location
from keras_vaultgemma.lora.adapter import Adapter
from keras_vaultgemma.lora.peft_config import (
    PREFIX,
    is_target,
    rank_and_alpha,
    read_config,
    unsupported,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def write_adapter(folder, adapter, hyperparameters, base_model=None, ledger=None, revision=None):
    """Write an adapter to a folder in PEFT's format. If writing fails, the folder is unchanged.

    Args:
        folder: string or path. Created if it does not exist.
        adapter: `Adapter`.
        hyperparameters: dict. Constructor arguments of the backbone, as for `weight_map`.
        base_model: string. Name or folder of the Hugging Face checkpoint that PEFT loads the
            adapter onto, or None to leave it open.
        ledger: `privacy.ledger.Ledger` to write to the same folder, or None.
        revision: string. Revision of `base_model`, or None.

    Raises:
        ValueError: If `folder` or a folder above it is a file.
        OSError: If the files cannot be written.
    """
    weights = {
        path: weight
        for path, weight in _matrices(hyperparameters).items()
        if path in adapter.factors
    }
    tensors = [
        (location, LazyTensor(value, Location("", value.shape, (0, 1)), value.shape))
        for path, weight in weights.items()
        for locations, value in zip(
            _locations(weight, adapter.rank_of(path)), adapter.factors[path], strict=True
        )
        for location in locations
    ]
    modules = {location.name.removeprefix(PREFIX).partition(".lora_")[0] for location, _ in tensors}
    config = {
        "alpha_pattern": _pattern(weights, adapter.alphas),
        "base_model_name_or_path": base_model,
        "bias": "none",
        "ensure_weight_tying": EMBEDDING in modules,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(adapter.alpha),
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": _pattern(weights, adapter.ranks),
        "revision": revision,
        "target_modules": _target_modules(modules, weights.keys(), hyperparameters),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    with new_folder(folder) as new:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (new / CONFIG).write_text(text, encoding="utf-8")
        write_safetensors(new / WEIGHTS, tensors, DTYPES["float32"])
        if ledger is not None:
            ledger.write(new)


def read_adapter(folder, hyperparameters):
    """Read an adapter that `write_adapter` or PEFT wrote.

    Everything is checked before memory for the factors is allocated. PEFT saves the embedding
    itself with an adapter of the embedding; this copy is not read.

    Args:
        folder: string or path. Folder with `adapter_config.json` and `adapter_model.safetensors`.
        hyperparameters: dict. Constructor arguments of the backbone, as for `weight_map`.

    Returns:
        `Adapter`.

    Raises:
        ValueError: If a field of the config belongs to another method or is out of range, a file is
            missing, truncated or malformed, a tensor is missing, unknown or of another shape (the
            message has both shapes), or the head has other factors than the embedding.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    tensors = open_safetensors(folder / WEIGHTS)
    targets = {
        path: weight
        for path, weight in _matrices(hyperparameters).items()
        if is_target(_module(weight), config, tensors)
    }
    scales = {path: _rank_and_alpha(folder, weight, config) for path, weight in targets.items()}
    locations = {path: _locations(weight, scales[path][0]) for path, weight in targets.items()}
    expected = {
        location.name: location.shape
        for pair in locations.values()
        for factor in pair
        for location in factor
    }
    if "token_embedding" in targets:
        copies = {f"{PREFIX}{module}.base_layer.weight" for module in (EMBEDDING, HEAD)}
        expected |= dict.fromkeys(copies & tensors.keys(), targets["token_embedding"].shape)
    check_shapes(folder, expected, tensors)
    if not targets:
        legal = "names of layers that this model has"
        raise unsupported(folder / CONFIG, "target_modules", legal, config["target_modules"])
    rank, alpha = rank_and_alpha("", {**config, "rank_pattern": None, "alpha_pattern": None})
    return Adapter(
        rank,
        alpha,
        float(config["lora_dropout"]),
        {
            path: tuple(_read_factor(folder, factor, tensors) for factor in pair)
            for path, pair in locations.items()
        },
        {path: found[0] for path, found in scales.items() if found[0] != rank},
        {path: found[1] for path, found in scales.items() if found[1] != alpha},
    )


def _rank_and_alpha(folder, weight, config):
    """Return rank and alpha of a layer, which embedding and head must share."""
    found = rank_and_alpha(_module(weight), config)
    if _module(weight) == EMBEDDING and rank_and_alpha(HEAD, config) != found:
        raise unsupported(
            folder / CONFIG,
            "rank_pattern` and `alpha_pattern",
            f"equal for {EMBEDDING} and {HEAD}, which are tied",
            [config.get("rank_pattern"), config.get("alpha_pattern")],
        )
    return found


def _pattern(weights, values):
    """Return `{module: value}` for PEFT from `{path: value}`."""
    modules = {}
    for path, value in values.items():
        modules[_module(weights[path])] = _number(value)
        if _module(weights[path]) == EMBEDDING:
            modules[HEAD] = _number(value)
    return modules


def _number(value):
    """Return a number as an int if it is one."""
    return int(value) if value == int(value) else value


def _matrices(hyperparameters):
    """Return `{path of the layer: Weight}` of every matrix, in the order of the layers."""
    weights = weight_map.weight_map(hyperparameters)
    return {weight.path.rpartition("/")[0]: weight for weight in weights if len(weight.shape) == 2}


def _locations(weight, rank):
    """Return the locations of A `[in, r]` and of B `[r, out]` in PEFT's file, a list for each."""
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


def _read_factor(folder, locations, tensors):
    """Return the float32 array of a factor, and check that all its copies in the file are equal."""
    first, *others = locations
    shape = tuple(first.shape[axis] for axis in first.axes)
    value = LazyTensor(tensors[first.name], first, shape).read("float32")
    for other in others:
        copy = LazyTensor(tensors[other.name], other, shape).read("float32")
        if not np.array_equal(copy, value):
            raise ValueError(
                f"{folder}: {other.name} must be the transpose of {first.name}, because the head "
                "of VaultGemma is tied to its embedding (`ensure_weight_tying=True` in PEFT)"
            )
    return value


def _target_modules(modules, paths, hyperparameters):
    """Return `target_modules` for PEFT, without layer prefixes if no other module then matches."""
    names = {module.rpartition(".")[2] for module in modules}
    matched = {
        path
        for path, weight in _matrices(hyperparameters).items()
        if _module(weight).rpartition(".")[2] in names
    }
    return sorted(names if matched == set(paths) else modules)


def _module(weight):
    return weight.locations[weight_map.HUGGING_FACE].name.removesuffix(".weight")
