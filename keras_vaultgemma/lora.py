"""LoRA adapters of a model: named, switched, merged, saved and loaded.

```python
model.backbone.enable_lora(rank=8, target_layer_names=["query", "value", "gate"], alpha=16, dropout=0.05)
model.compile(optimizer=keras.optimizers.Adam(1e-3))
model.fit(texts)
lora.save_adapter(model, "my_adapter")  # a few megabytes, which PEFT loads, too
```

One adapter is active at a time; the factors of the others are on the host. Whatever changes the variables of a model
(another rank, other layers, no adapter) lets it compile anew, and an optimizer belongs to the variables that it was
made for: call `compile` before training goes on.

Every function takes a `VaultGemmaCausalLM` or a `VaultGemmaBackbone`. A task that generates, trains or predicts must be
the one that is handed over, so that its compiled functions go.
"""

import numbers
import re

import numpy as np
from keras import ops

from keras_vaultgemma import adapter as files
from keras_vaultgemma import backend
from keras_vaultgemma.adapter import Adapter

DEFAULT_TARGETS = ("query", "value")
ATTENTION, MLP = ("query", "key", "value", "attention_output"), ("gate", "up", "down")


class Adapters:
    """The adapters of one backbone.

    Attributes:
        stored: `{name: Adapter}`, in the order that they came in. The factors of the active one are the layers'
            variables, and None here.
        active: name of the one that the model computes with, or None.
        base: while the active one is merged, the layers' own values `{path: {key: NumPy array}}`, else None.
    """

    def __init__(self):
        self.stored, self.active, self.base = {}, None, None


def names(model):
    """List of the names of the model's adapters."""
    return list(_backbone(model).adapters.stored)


def active(model):
    """Name of the adapter that the model computes with, or None."""
    return _backbone(model).adapters.active


def add(model, rank, targets=None, alpha=None, dropout=0.0, name="default"):
    """Freeze the model and add an adapter that changes nothing yet; it becomes the active one.

    Args:
        rank: r.
        targets: names of layers (query, key, value, attention_output, gate, up, down, token_embedding) or regular
            expressions that match their whole paths (`decoder_block_0/attention/query`). Defaults to query and value.
        alpha: the update is scaled by alpha / r, as in PEFT. Defaults to `rank`.
        dropout: part of the adapters' input that is dropped in training. The embedding has none.
        name: of the adapter.

    Raises:
        ValueError: for an argument out of its range, a target that no layer has, a name that is taken, or a model whose
            adapter is merged.
    """
    alpha = rank if alpha is None else alpha
    if not isinstance(rank, numbers.Integral) or isinstance(rank, bool) or rank <= 0:
        raise ValueError(f"`rank` must be a positive integer. Received: rank={rank!r}")
    if not isinstance(alpha, numbers.Real) or not 0 < alpha < float("inf"):
        raise ValueError(f"`alpha` must be a finite number above 0. Received: alpha={alpha!r}")
    if not isinstance(dropout, numbers.Real) or not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be a number from 0 to below 1. Received: dropout={dropout!r}")
    paths = _chosen(_layers(_backbone(model)), DEFAULT_TARGETS if targets is None else targets)
    _add(model, name, Adapter(int(rank), float(alpha), float(dropout), dict.fromkeys(paths)))


def use(model, name):
    """Switch to another adapter, or with None to the model without any.

    Adapters of one shape (layers, rank, alpha, dropout) are switched without compiling anew.

    Raises:
        ValueError: for a name that the model has no adapter of, or a model whose adapter is merged.
    """
    adapters = _unmerged(model)
    if name is not None and name not in adapters.stored:
        raise ValueError(f"`name` must be None or one of {list(adapters.stored)}. Received: {name!r}")
    if name != adapters.active:
        _switch(model, name)


def remove(model, name):
    """Forget an adapter. Where it is the active one, the model goes on without any.

    Raises:
        ValueError: as `use`.
    """
    adapters = _unmerged(model)
    if name not in adapters.stored:
        raise ValueError(f"`name` must be one of {list(adapters.stored)}. Received: {name!r}")
    if name == adapters.active:
        use(model, None)
    del adapters.stored[name]


def merge(model):
    """Add the active adapter to the base weights, so that the model computes at the speed that it has without.

    A copy of the weights that change stays on the host for `unmerge`: 0.12 GB for query and value of VaultGemma 1B in
    bfloat16, as much as the model itself where everything is a target. A bfloat16 base rounds the sum W + s A B to its
    8 bits, and what was learned may be smaller than a step of them; an int8 base is dequantized, added to and quantized
    again with new scales. Neither computes exactly what the adapter does.

    Raises:
        ValueError: where no adapter is active, or it is merged already.
    """
    adapters = _unmerged(model)
    if adapters.active is None:
        raise ValueError("`merge` needs an active adapter, and the model has none; see `lora.use`")
    backbone = _backbone(model)
    layers = _layers(backbone)
    paths = adapters.stored[adapters.active].factors
    adapters.stored[adapters.active] = _on_host(backbone, adapters.active)
    base = {}
    for path in paths:
        merged = _own_values(layers[path])  # as Keras would write them into a file
        layers[path].disable_lora()
        base[path] = _own_values(layers[path])
        layers[path].load_own_variables(merged)
    adapters.base = base
    _forget_programs(model)


def unmerge(model):
    """Undo `merge`: the base weights are again what they were, to the bit, and the adapter is active.

    Raises:
        ValueError: where nothing is merged, or the model was quantized since.
    """
    backbone, adapters = _backbone(model), _backbone(model).adapters
    if adapters.base is None:
        raise ValueError("`unmerge` needs a merged adapter, and the model has none")
    layers = _layers(backbone)
    for path, values in adapters.base.items():
        if len(values) != len(layers[path].weights):
            raise ValueError(f"`unmerge` needs the layers as `merge` left them, and {path} was quantized since")
    for path, values in adapters.base.items():
        layers[path].load_own_variables(values)
    adapters.base = None
    _put_factors_in(model, adapters.stored[adapters.active])


def save_adapter(model, folder, name=None, base_model=None):
    """Save an adapter alone, in float32 and PEFT's format; `PeftModel.from_pretrained(base, folder)` loads it.

    Args:
        folder: made where it does not exist; appears whole or not at all.
        name: of the adapter. Defaults to the active one.
        base_model: name or folder of the Hugging Face checkpoint to name as the base, or None.

    Raises:
        ValueError: for a name that the model has no adapter of, or where nothing can be written.
        OSError: where nothing can be written there.
    """
    backbone = _backbone(model)
    name = backbone.adapters.active if name is None else name
    if name not in backbone.adapters.stored:
        raise ValueError(f"`name` must be one of {names(model)}. Received: {name!r}")
    files.write(folder, _on_host(backbone, name), backbone.get_config(), base_model)


def load_adapter(model, folder, name="default"):
    """Load an adapter that `save_adapter` or PEFT wrote. It becomes the active one, and can be trained on.

    Raises:
        ValueError: for a name that is taken, a model whose adapter is merged, an adapter of another model or shape
            (with the tensor that is missing, unknown or misshapen, and both shapes), another method than plain LoRA, or
            files that are missing, cut short or malformed.
    """
    _add(model, name, files.read(folder, _backbone(model).get_config()))


def _backbone(model):
    return getattr(model, "backbone", model)


def _unmerged(model):
    adapters = _backbone(model).adapters
    if adapters.base is not None:
        raise ValueError(f"The adapter {adapters.active!r} is merged into the model; call `lora.unmerge` first")
    return adapters


def _layers(backbone):
    """{path: layer} of every layer that can have an adapter."""
    layers = [backbone.token_embedding]
    for block in backbone.transformer_layers:
        layers += [getattr(block.attention, name) for name in ATTENTION] + [getattr(block, name) for name in MLP]
    return {layer.path: layer for layer in layers}


def _chosen(layers, targets):
    """Paths of the layers that names or regular expressions choose, in the order of the layers."""
    chosen = set()
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            found = {
                path for path, layer in layers.items() if layer.name == target or re.fullmatch(target, path) is not None
            }
        except (re.error, TypeError) as error:
            raise ValueError(
                f"A target must be a name or a regular expression. Received: {target!r} ({error})"
            ) from error
        if not found:
            example = next(path for path in layers if "/" in path)
            legal = ", ".join(dict.fromkeys(layer.name for layer in layers.values()))
            raise ValueError(
                f"A target must be one of {legal}, or match a path such as {example}. Received: {target!r}"
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"`target_layer_names` must name at least one layer. Received: {targets!r}")
    return [path for path in layers if path in chosen]


def _add(model, name, adapter):
    adapters = _unmerged(model)
    if not isinstance(name, str) or not name or name in adapters.stored:
        raise ValueError(
            f"`name` must be a string that no adapter of this model has: {list(adapters.stored)}. Received: {name!r}"
        )
    layers = _layers(_backbone(model))
    for path in adapter.factors:
        layers[path].check_base(layers[path].quantization_mode)
    adapters.stored[name] = adapter
    _switch(model, name)


def _switch(model, name):
    backbone, adapters = _backbone(model), _backbone(model).adapters
    if adapters.active is not None:
        adapters.stored[adapters.active] = _on_host(backbone, adapters.active)
    if name is not None and _can_stand_in(adapters.stored[name], adapters.stored.get(adapters.active)):
        layers = _layers(backbone)
        for path, factors in adapters.stored[name].factors.items():
            for variable, value in zip(layers[path].lora_factors, factors, strict=True):
                variable.assign(value)
    else:
        _take_factors_away(model)
        if name is not None:
            _put_factors_in(model, adapters.stored[name])
    adapters.active = name


def _can_stand_in(new, old):
    """Whether the variables that hold one adapter can hold another, whose factors are there."""
    if old is None or None in new.factors.values() or new.factors.keys() != old.factors.keys():
        return False
    return new[:3] == old[:3]


def _on_host(backbone, name):
    """An adapter with its factors, wherever they are."""
    adapters = backbone.adapters
    adapter = adapters.stored[name]
    if name != adapters.active or adapters.base is not None:
        return adapter
    layers = _layers(backbone)
    return adapter._replace(
        factors={path: tuple(map(_copy, layers[path].lora_factors)) for path in adapter.factors},
    )


def _put_factors_in(model, adapter):
    """Freeze the model but for an adapter's factors; those that are None start at random."""
    backbone = _backbone(model)
    backbone.trainable = True
    for layer in backbone.layers:
        layer.trainable = False
    layers = _layers(backbone)
    for path, factors in adapter.factors.items():
        layers[path].trainable = True
        values = (
            {} if factors is None else dict(zip(("a_initializer", "b_initializer"), map(_start, factors), strict=True))
        )
        layers[path].enable_lora(adapter.rank, adapter.alpha, dropout=adapter.dropout, **values)
    _forget_programs(model)


def _take_factors_away(model):
    for layer in _layers(_backbone(model)).values():
        if layer.lora_enabled:
            layer.disable_lora()
    _forget_programs(model)


def _forget_programs(model):
    """Let Keras compile anew: its functions hold the variables that were there, and the scale of their product."""
    model.train_function = model.test_function = model.predict_function = None


def _start(value):
    """A Keras initializer that gives a variable a value."""
    return lambda shape, dtype: backend.from_numpy(np.array(value))


def _own_values(layer):
    """What Keras writes of a layer into a file, the update of an adapter merged: `{key: NumPy array}`."""
    values = {}
    layer.save_own_variables(values)
    return {key: _copy(value) for key, value in values.items()}


def _copy(value):
    # PyTorch's and TensorFlow's NumPy arrays are views of the variable.
    return np.array(ops.convert_to_numpy(value))
