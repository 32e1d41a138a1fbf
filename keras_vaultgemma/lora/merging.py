"""Merge the active adapter into the base weights, and restore them."""

import keras

from keras_vaultgemma.lora import injection
from keras_vaultgemma.lora.state import (
    adapter_state,
    adapter_with_values,
    backbone_of,
    create_variables,
    forget_compiled_functions,
    unmerged_state,
)


def merge(model: keras.Model) -> None:
    """Add the active adapter's update to the base weights, so that it costs no time in generation.

    A copy of the weights that change stays in host memory for `unmerge`: 0.12 GB for query and
    value of VaultGemma 1B in bfloat16, and as much as the model itself if every layer is a target.

    With a float32 base, the merged model computes the same up to rounding. In bfloat16, W + s A B
    is rounded to 8 significant bits, and the rounding error can exceed the update itself. A base
    in int8 or int4 is dequantized, added to and requantized with new scales, a second
    rounding that in int4 is coarse: keep the adapter, or merge it into the base in floating point,
    as `keras-vaultgemma convert` does.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.

    Raises:
        ValueError: If no adapter is active, or the active one is merged already.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=4)
    lora.merge(model)
    model.save_to_preset("merged")
    ```
    """
    state = unmerged_state(model)
    if state.active is None:
        raise ValueError("`merge` needs an active adapter, and the model has none; see `lora.use`")
    backbone = backbone_of(model)
    layers = injection.adaptable_layers(backbone)
    state.stored[state.active] = adapter_with_values(backbone, state.active)
    base_values = {}
    for path in state.stored[state.active].factors:
        merged = injection.saved_values(layers[path])
        layers[path].disable_lora()
        base_values[path] = injection.saved_values(layers[path])
        layers[path].load_own_variables(merged)
    state.base_values = base_values
    forget_compiled_functions(model)


def unmerge(model: keras.Model) -> None:
    """Undo `merge`: restore the base weights bit for bit and activate the adapter again.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.

    Raises:
        ValueError: If no adapter is merged, or the model was quantized after the merge.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=4)
    lora.merge(model)
    lora.unmerge(model)
    ```
    """
    backbone, state = backbone_of(model), adapter_state(model)
    if not state.is_merged:
        raise ValueError("`unmerge` needs a merged adapter, and the model has none")
    layers = injection.adaptable_layers(backbone)
    for path, values in state.base_values.items():
        if len(values) != len(layers[path].weights):
            raise ValueError(
                "`unmerge` needs the layers as `merge` left them. "
                f"Received: {path}, which was quantized afterwards"
            )
    for path, values in state.base_values.items():
        layers[path].load_own_variables(values)
    state.base_values = None
    create_variables(backbone, state.active)
    forget_compiled_functions(model)
