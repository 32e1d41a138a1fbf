"""The adapters that a backbone holds, and how one replaces another.

The factors of the active adapter are variables of the layers. The factors of all other adapters are
NumPy arrays in host memory, so that they take no device memory.
"""

from keras_vaultgemma.lora import injection


class AdapterState:
    """The adapters of one backbone.

    Attributes:
        stored: dict. `{name: Adapter}`, in the order in which the adapters were added. The factors
            of the active adapter are None here, because they are variables of the layers.
        active: string. Name of the active adapter, or None.
        base_values: dict. While the active adapter is merged, the values that its layers had before
            the merge, as `{path: {key: NumPy array}}`; otherwise None.
    """

    def __init__(self):
        self.clear()

    def clear(self):
        """Forget all adapters."""
        self.stored, self.active, self.base_values = {}, None, None

    @property
    def is_merged(self):
        """True if the active adapter is merged into the base weights."""
        return self.base_values is not None


def backbone_of(model):
    """Return the backbone of a `VaultGemmaCausalLM`, or the backbone itself."""
    return getattr(model, "backbone", model)


def adapter_state(model):
    """Return the `AdapterState` of a model's backbone, which is created on first use."""
    backbone = backbone_of(model)
    if not hasattr(backbone, "adapters"):
        backbone.adapters = AdapterState()
    return backbone.adapters


def unmerged_state(model):
    """Return the `AdapterState` of a model, or raise ValueError if its adapter is merged."""
    state = adapter_state(model)
    if state.is_merged:
        raise ValueError(
            f"The adapter {state.active!r} is merged into the model; call `lora.unmerge` first"
        )
    return state


def add_adapter(model, name, adapter):
    """Add an `Adapter` to a model under a new name and make it the active one.

    Raises:
        ValueError: If the name is empty, not a string or taken, the active adapter is merged, or a
            layer is quantized to something other than int8 or int4. The model is then unchanged.
    """
    state = unmerged_state(model)
    if not isinstance(name, str) or not name or name in state.stored:
        raise ValueError(
            f"`name` must be a non-empty string other than {list(state.stored)}. "
            f"Received: name={name!r}"
        )
    layers = injection.adaptable_layers(backbone_of(model))
    for path in adapter.factors:
        layers[path].check_base(layers[path].quantization_mode)
    state.stored[name] = adapter
    switch_adapter(model, name)


def switch_adapter(model, name):
    """Make the stored adapter `name` the active one, or deactivate all of them if it is None."""
    backbone, state = backbone_of(model), adapter_state(model)
    old, new = state.stored.get(state.active), state.stored.get(name)
    if old is not None:
        state.stored[state.active] = injection.read_factors(backbone, old)
    if old is not None and new is not None and _fits_variables(new, old):
        injection.assign_factors(backbone, new)
        state.stored[name] = new.without_values()
    else:
        injection.remove_factors(backbone)
        if new is not None:
            create_variables(backbone, name)
        forget_compiled_functions(model)
    state.active = name


def create_variables(backbone, name):
    """Create the layers' factor variables from the values of the stored adapter `name`."""
    stored = adapter_state(backbone).stored
    injection.create_factors(backbone, stored[name])
    stored[name] = stored[name].without_values()


def adapter_with_values(backbone, name):
    """Return the `Adapter` called `name` with its values, from the variables or from the host."""
    state = adapter_state(backbone)
    adapter = state.stored[name]
    if name == state.active and not state.is_merged:
        return injection.read_factors(backbone, adapter)
    return adapter


def forget_compiled_functions(model):
    """Make Keras compile its functions again before they next run.

    The functions refer to the variables of the adapter they were compiled with and contain its
    scale as a constant.
    """
    model.train_function = model.test_function = model.predict_function = None


def _fits_variables(new, old):
    """Return True if `new` has values and the variables that hold `old` can hold them."""
    return None not in new.factors.values() and new.without_values() == old.without_values()
