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

from keras_vaultgemma import backend
from keras_vaultgemma.lora import injection
from keras_vaultgemma.lora.peft_format import Adapter, read_adapter, write_adapter
from keras_vaultgemma.privacy.ledger import preset_ledger

DEFAULT_TARGETS = ("query", "value")


class Adapters:
    """The adapters of one backbone.

    Attributes:
        stored: `{name: Adapter}`, in the order that they came in. The factors of the active one are variables of the
            layers, and None here.
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
        raise ValueError(
            f"`dropout` must be a number from 0 to below 1. Received: dropout={dropout!r}"
        )
    paths = injection.match_targets(
        _backbone(model), DEFAULT_TARGETS if targets is None else targets
    )
    _add(model, name, Adapter(int(rank), float(alpha), float(dropout), dict.fromkeys(paths)))


def use(model, name):
    """Switch to another adapter, or with None to the model without any.

    Adapters of one shape (layers, rank, alpha, dropout) are switched without compiling anew.

    Raises:
        ValueError: for a name that the model has no adapter of, or a model whose adapter is merged.
    """
    adapters = _unmerged(model)
    if name is not None and name not in adapters.stored:
        raise ValueError(
            f"`name` must be None or one of {list(adapters.stored)}. Received: {name!r}"
        )
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
    layers = injection.adaptable_layers(backbone)
    adapters.stored[adapters.active] = _with_values(backbone, adapters.active)
    base = {}
    for path in adapters.stored[adapters.active].factors:
        merged = injection.saved_values(layers[path])
        layers[path].disable_lora()
        base[path] = injection.saved_values(layers[path])
        layers[path].load_own_variables(merged)
    adapters.base = base
    _forget_compiled_functions(model)


def unmerge(model):
    """Undo `merge`: the base weights are again what they were, to the bit, and the adapter is active.

    Raises:
        ValueError: where nothing is merged, or the model was quantized since.
    """
    backbone, adapters = _backbone(model), _backbone(model).adapters
    if adapters.base is None:
        raise ValueError("`unmerge` needs a merged adapter, and the model has none")
    layers = injection.adaptable_layers(backbone)
    for path, values in adapters.base.items():
        if len(values) != len(layers[path].weights):
            raise ValueError(
                f"`unmerge` needs the layers as `merge` left them, and {path} was quantized since"
            )
    for path, values in adapters.base.items():
        layers[path].load_own_variables(values)
    adapters.base = None
    _inject(backbone, adapters.active)
    _forget_compiled_functions(model)


def save_adapter(model, folder, name=None, base_model=None):
    """Save an adapter alone, in float32 and PEFT's format; `PeftModel.from_pretrained(base, folder)` loads it.

    The model's privacy ledger, where there is one, stands beside it.

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
    with backend.all_gathered(backbone.trainable_variables) as writes:
        if writes:
            adapter = _with_values(backbone, name)
            write_adapter(
                folder, adapter, backbone.get_config(), base_model, backbone.privacy.ledger
            )


def load_adapter(model, folder, name="default"):
    """Load an adapter that `save_adapter` or PEFT wrote. It becomes the active one, and can be trained on.

    What a ledger beside it says is added to the model's.

    Raises:
        ValueError: for a name that is taken, a model whose adapter is merged, an adapter of another model or shape
            (with the tensor that is missing, unknown or misshapen, and both shapes), another method than plain LoRA, or
            files that are missing, cut short or malformed. The model then stays as it was.
    """
    adapter = read_adapter(folder, _backbone(model).get_config())
    history = preset_ledger(folder)
    _add(model, name, adapter)
    _backbone(model).privacy.add(history)


def _backbone(model):
    return getattr(model, "backbone", model)


def _unmerged(model):
    adapters = _backbone(model).adapters
    if adapters.base is not None:
        raise ValueError(
            f"The adapter {adapters.active!r} is merged into the model; call `lora.unmerge` first"
        )
    return adapters


def _add(model, name, adapter):
    adapters = _unmerged(model)
    if not isinstance(name, str) or not name or name in adapters.stored:
        raise ValueError(
            f"`name` must be a string that no adapter of this model has: {list(adapters.stored)}. Received: {name!r}"
        )
    layers = injection.adaptable_layers(_backbone(model))
    for path in adapter.factors:
        layers[path].check_base(layers[path].quantization_mode)
    adapters.stored[name] = adapter
    _switch(model, name)


def _switch(model, name):
    backbone, adapters = _backbone(model), _backbone(model).adapters
    old, new = adapters.stored.get(adapters.active), adapters.stored.get(name)
    if old is not None:
        adapters.stored[adapters.active] = injection.read_factors(backbone, old)
    if old is not None and new is not None and _can_stand_in(new, old):
        injection.assign_factors(backbone, new)
        adapters.stored[name] = _without_values(new)
    else:
        injection.remove_factors(backbone)
        if new is not None:
            _inject(backbone, name)
        _forget_compiled_functions(model)
    adapters.active = name


def _inject(backbone, name):
    adapters = backbone.adapters
    injection.inject(backbone, adapters.stored[name])
    adapters.stored[name] = _without_values(adapters.stored[name])


def _can_stand_in(new, old):
    """Whether the variables that hold one adapter can hold another, which has values."""
    return None not in new.factors.values() and _without_values(new) == _without_values(old)


def _without_values(adapter):
    return adapter._replace(factors=dict.fromkeys(adapter.factors))


def _with_values(backbone, name):
    """An adapter with its values, wherever they are."""
    adapters = backbone.adapters
    in_variables = name == adapters.active and adapters.base is None
    return (
        injection.read_factors(backbone, adapters.stored[name])
        if in_variables
        else adapters.stored[name]
    )


def _forget_compiled_functions(model):
    """Let Keras compile anew: its functions hold the variables that were there, and the scale of their product."""
    model.train_function = model.test_function = model.predict_function = None
