"""Adapters in the configs and in the files of weights that Keras writes.

The factors of the active adapter are saved by the layers, next to their matrices. Everything else
belongs to the backbone: its config describes the adapters, so that a model that is built from it
has the same ones, and its entry in a file of weights has this description, the factors of the
other adapters, and the weights from before a merge.
"""

import json
import warnings

import numpy as np

from keras_vaultgemma.lora import injection
from keras_vaultgemma.lora.adapter import Adapter
from keras_vaultgemma.lora.merging import merge
from keras_vaultgemma.lora.state import adapter_state, add_adapter, switch_adapter

PREFIX = "adapters."
"""Prefix of the names of a backbone's saved values that are about adapters."""

ENTRY = f"{PREFIX}json"
"""Name of the description among them."""


def describe(backbone):
    """Return a description of a backbone's adapters for JSON; None if it has none."""
    state = adapter_state(backbone)
    if not state.stored:
        return None
    adapters = [
        {
            "name": name,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "dropout": adapter.dropout,
            "layers": list(adapter.factors),
            "ranks": dict(adapter.ranks),
            "alphas": dict(adapter.alphas),
        }
        for name, adapter in state.stored.items()
    ]
    return {"active": state.active, "is_merged": state.is_merged, "adapters": adapters}


def rebuild(backbone, description):
    """Give a backbone without adapters those of a description, with initial values."""
    for found in description["adapters"]:
        factors = dict.fromkeys(found["layers"])
        settings = (found[key] for key in ("rank", "alpha", "dropout"))
        adapter = Adapter(*settings, factors, found["ranks"], found["alphas"])
        add_adapter(backbone, found["name"], adapter)
    if description["active"] != adapter_state(backbone).active:
        switch_adapter(backbone, description["active"])
    if description["is_merged"]:
        merge(backbone)


def trainable_weights(backbone):
    """Return the paths of the trainable weights; None if none is frozen."""
    weights = [v for layer in injection.weight_layers(backbone) for v in _trainable_kind(layer)]
    trained = [v.path for v in weights if v.trainable]
    return None if len(trained) == len(weights) else trained


def freeze_all_but(backbone, paths):
    """Make the weights at `paths` trainable, and no others."""
    for layer in injection.weight_layers(backbone):
        weights = _trainable_kind(layer)
        layer.trainable = any(v.path in paths for v in weights)
        for variable in weights:
            variable.trainable = variable.path in paths


def _trainable_kind(layer):
    """Return the weights of a layer that can be trained."""
    is_quantized = layer.quantization_mode not in (None, "float8")
    return list(getattr(layer, "lora_factors", ())) if is_quantized else layer.weights


def save(backbone, store):
    """Write what the layers do not save of a backbone's adapters."""
    description, state = describe(backbone), adapter_state(backbone)
    if description is None:
        return
    store[ENTRY] = np.frombuffer(json.dumps(description).encode(), "uint8")
    for name, array in _arrays(state).items():
        store[name] = array


def load(backbone, values):
    """Replace a backbone's adapters by those that came with weights, before its layers load theirs.

    Variables stay the same where the adapters have the same description.

    Args:
        backbone: `VaultGemmaBackbone`.
        values: dict of the backbone's saved values, without those of others.
    """
    state = adapter_state(backbone)
    if ENTRY not in values:
        _load_without_adapters(backbone)
        return
    description = json.loads(np.array(values[ENTRY]).tobytes())
    if describe(backbone) != description:
        if state.stored:
            warnings.warn(
                f"The adapters {list(state.stored)} of the model were replaced by those of the "
                f"weights, {[found['name'] for found in description['adapters']]}: names, ranks, "
                "alphas, dropouts, layers or which one is active or merged differ. Call `compile` "
                "before you train. `lora.save_adapter` saves adapters, and `lora.load_adapter` "
                "adds one.",
                stacklevel=2,
            )
        injection.remove_factors(backbone)
        state.clear()
        rebuild(backbone, description)
    for name, array in _arrays(state).items():
        array[...] = values[name]


def _load_without_adapters(backbone):
    state = adapter_state(backbone)
    layers = injection.adaptable_layers(backbone).values()
    if state.is_merged:
        warnings.warn(
            f"The weights have no adapter: {state.active!r}, which was merged into those of the "
            "model, is no longer active. `lora.use` activates it on the new weights.",
            stacklevel=3,
        )
        state.active = state.base_values = None
    elif any(layer.has_update for layer in layers):
        warnings.warn(
            f"The weights have no adapter: the update of {state.active!r} was set to zero, so that "
            "the model computes what the saved one did. To change the weights under a trained "
            "adapter, call `lora.save_adapter` before and `lora.load_adapter` afterwards.",
            stacklevel=3,
        )


def _arrays(state):
    """Return `{name: NumPy array}` of what waits in host memory."""
    arrays = {}
    for i, adapter in enumerate(state.stored.values()):
        for j, factors in enumerate(adapter.factors.values()):
            for k, array in enumerate(factors or ()):
                arrays[f"{PREFIX}{i}.{j}.{'ab'[k]}"] = array
    for j, values in enumerate((state.base_values or {}).values()):
        for key, array in values.items():
            arrays[f"{PREFIX}base.{j}.{key}"] = array
    return arrays
