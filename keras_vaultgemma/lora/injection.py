"""The layers of a backbone that accept an adapter, and access to the adapter's variables."""

import contextlib
import re

import numpy as np
from keras import ops

from keras_vaultgemma import backend

ATTENTION, MLP = ("query", "key", "value", "attention_output"), ("gate", "up", "down")


def adaptable_layers(backbone):
    """Return `{path: layer}` of all layers that accept an adapter: embedding and projections."""
    layers = [backbone.token_embedding]
    for block in backbone.transformer_layers:
        layers += [getattr(block.attention, name) for name in ATTENTION]
        layers += [getattr(block, name) for name in MLP]
    return {layer.path: layer for layer in layers}


def weight_layers(backbone):
    """Return a list of all layers with weights of their own: the above and the norms."""
    layers = list(adaptable_layers(backbone).values())
    for block in backbone.transformer_layers:
        layers += [block.attention_norm, block.mlp_norm]
    return [*layers, backbone.final_norm]


def match_targets(backbone, targets):
    """Return the paths of the layers that match any of the targets, in the order of the layers.

    Args:
        backbone: `VaultGemmaBackbone`.
        targets: string or list of strings. Names of layers, or regular expressions that match whole
            paths.

    Returns:
        List of strings.

    Raises:
        ValueError: If a target is neither, or matches no layer, or there is no target.
    """
    layers, matched = adaptable_layers(backbone), set()
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            pattern = re.compile(target)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"A target must be a name or a regular expression. Received: {target!r}"
            ) from error
        paths = {
            path
            for path, layer in layers.items()
            if layer.name == target or pattern.fullmatch(path)
        }
        if not paths:
            names = list(dict.fromkeys(layer.name for layer in layers.values()))
            raise ValueError(
                f"A target must be one of {names} or match a path such as {list(layers)[1]}. "
                f"Received: {target!r}"
            )
        matched |= paths
    if not matched:
        raise ValueError(f"`target_layer_names` must name a layer. Received: {targets!r}")
    return [path for path in layers if path in matched]


def create_factors(backbone, adapter):
    """Freeze a backbone without factors and create the trainable factors of an adapter.

    Args:
        backbone: `VaultGemmaBackbone`.
        adapter: `Adapter`. The factors start from its values, or from random values where these are
            None.
    """
    backbone.trainable = True
    for layer in backbone.layers:
        layer.trainable = False
    layers = adaptable_layers(backbone)
    for path, factors in adapter.factors.items():
        initializers = {}
        if factors is not None:
            a, b = map(_initializer, factors)
            initializers = {"a_initializer": a, "b_initializer": b}
        layers[path].trainable = True
        layers[path].enable_lora(
            adapter.rank_of(path),
            adapter.alpha_of(path),
            dropout=adapter.dropout,
            **initializers,
        )


def assign_factors(backbone, adapter):
    """Assign the values of an adapter to existing factors of the same shapes."""
    layers = adaptable_layers(backbone)
    for path, factors in adapter.factors.items():
        for variable, value in zip(layers[path].lora_factors, factors, strict=True):
            variable.assign(value)


def read_factors(backbone, adapter):
    """Return a copy of an adapter with the current values of its layers' factors."""
    layers = adaptable_layers(backbone)
    factors = {path: tuple(map(_copy, layers[path].lora_factors)) for path in adapter.factors}
    return adapter._replace(factors=factors)


def remove_factors(backbone):
    """Remove all factors. Every layer stays frozen."""
    for layer in adaptable_layers(backbone).values():
        if layer.lora_enabled:
            layer.disable_lora()


def saved_values(layer):
    """Return `{key: array}` that Keras saves for a layer, in which its adapter is merged."""
    values = {}
    with saving_merged([layer]):
        layer.save_own_variables(values)
    return {key: _copy(value) for key, value in values.items()}


@contextlib.contextmanager
def saving_merged(layers):
    """Context in which layers save their matrix merged with the adapter instead of both."""
    for layer in layers:
        layer.saves_merged = True
    try:
        yield
    finally:
        for layer in layers:
            layer.saves_merged = False


def _initializer(value):
    # Keras passes `layout` to an initializer that has this argument. To any other one it applies
    # the layout in a compiled function, in which a large factor would be a constant.
    return lambda shape, dtype, layout=None: backend.from_numpy(np.array(value), layout)


def _copy(value):
    # On PyTorch and TensorFlow the NumPy array is a view of the variable.
    return np.array(ops.convert_to_numpy(value))
