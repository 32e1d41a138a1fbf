"""The layers of a backbone that can have an adapter, and an adapter's way into and out of their variables."""

import re

import numpy as np
from keras import ops

from keras_vaultgemma import backend

ATTENTION, MLP = ("query", "key", "value", "attention_output"), ("gate", "up", "down")


def adaptable_layers(backbone):
    """{path: layer} of every layer that can have an adapter: the embedding and all projections."""
    layers = [backbone.token_embedding]
    for block in backbone.transformer_layers:
        layers += [getattr(block.attention, name) for name in ATTENTION] + [
            getattr(block, name) for name in MLP
        ]
    return {layer.path: layer for layer in layers}


def match_targets(backbone, targets):
    """Paths of the layers that are chosen, in the order of the layers.

    Args:
        targets: names of layers, or regular expressions that match whole paths; one or several.

    Raises:
        ValueError: for a target that is neither or that no layer has, or for no target.
    """
    layers, chosen = adaptable_layers(backbone), set()
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            pattern = re.compile(target)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"A target must be a name or a regular expression. Received: {target!r}"
            ) from error
        found = {
            path
            for path, layer in layers.items()
            if layer.name == target or pattern.fullmatch(path)
        }
        if not found:
            names, example = (
                list(dict.fromkeys(layer.name for layer in layers.values())),
                list(layers)[1],
            )
            raise ValueError(
                f"A target must be one of {names} or match a path as {example}. Received: {target!r}"
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"`target_layer_names` must name a layer. Received: {targets!r}")
    return [path for path in layers if path in chosen]


def inject(backbone, adapter):
    """Freeze a backbone that has no factors but for those of an adapter; where these are None they start at random."""
    backbone.trainable = True
    for layer in backbone.layers:
        layer.trainable = False
    layers = adaptable_layers(backbone)
    for path, factors in adapter.factors.items():
        names = ("a_initializer", "b_initializer")
        initializers = (
            {} if factors is None else dict(zip(names, map(_initializer, factors), strict=True))
        )
        layers[path].trainable = True
        layers[path].enable_lora(
            adapter.rank, adapter.alpha, dropout=adapter.dropout, **initializers
        )


def assign_factors(backbone, adapter):
    """Give the factors that are there the values of an adapter of the same shape."""
    layers = adaptable_layers(backbone)
    for path, factors in adapter.factors.items():
        for variable, value in zip(layers[path].lora_factors, factors, strict=True):
            variable.assign(value)


def read_factors(backbone, adapter):
    """The adapter whose factors are there, with their values."""
    layers = adaptable_layers(backbone)
    factors = {path: tuple(map(_copy, layers[path].lora_factors)) for path in adapter.factors}
    return adapter._replace(factors=factors)


def remove_factors(backbone):
    """Remove all factors; everything stays frozen."""
    for layer in adaptable_layers(backbone).values():
        if layer.lora_enabled:
            layer.disable_lora()


def saved_values(layer):
    """What Keras writes of a layer into a file, which has the update of an adapter in it: `{key: NumPy array}`."""
    values = {}
    layer.save_own_variables(values)
    return {key: _copy(value) for key, value in values.items()}


def _initializer(value):
    # By the name `layout` Keras knows that it need not compile a program that makes the parts for the devices.
    return lambda shape, dtype, layout=None: backend.from_numpy(np.array(value), layout)


def _copy(value):
    # PyTorch's and TensorFlow's NumPy arrays are views of the variable.
    return np.array(ops.convert_to_numpy(value))
