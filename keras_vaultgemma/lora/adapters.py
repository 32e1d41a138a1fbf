"""Adapters of a model: add, list, switch, remove, save and load."""

import os
import warnings
from collections.abc import Sequence

import keras

from keras_vaultgemma import backend
from keras_vaultgemma._validation import check_integer, check_number
from keras_vaultgemma.checkpoints import hubs, presets
from keras_vaultgemma.lora import injection
from keras_vaultgemma.lora.adapter import Adapter
from keras_vaultgemma.lora.peft_format import CONFIG, WEIGHTS, read_adapter, write_adapter
from keras_vaultgemma.lora.state import (
    adapter_state,
    adapter_with_values,
    add_adapter,
    backbone_of,
    switch_adapter,
    unmerged_state,
)
from keras_vaultgemma.privacy.ledger import preset_ledger

DEFAULT_TARGETS = ("query", "value")


def names(model: keras.Model) -> list[str]:
    """Return the names of a model's adapters, in the order in which they were added.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.

    Returns:
        List of strings.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=4, name="tales")
    print(lora.names(model))  # ['tales']
    ```
    """
    return list(adapter_state(model).stored)


def active(model: keras.Model) -> str | None:
    """Return the name of the adapter that the model computes with, or None.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.

    Returns:
        String, or None if no adapter is active.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    print(lora.active(model))  # None
    lora.add(model, rank=4, name="tales")
    print(lora.active(model))  # tales
    ```
    """
    return adapter_state(model).active


def add(
    model: keras.Model,
    rank: int,
    targets: str | Sequence[str] | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    name: str = "default",
) -> None:
    """Freeze the model and add a trainable adapter, which becomes the active one.

    The factor B starts at zero, so the model's output does not change before training.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.
        rank: int. Rank r of the factors A `[in, r]` and B `[r, out]`.
        targets: string or list of strings. Names of layers (query, key, value, attention_output,
            gate, up, down, token_embedding), or regular expressions that match the whole path of a
            layer, such as `decoder_block_0/attention/query`. Defaults to query and value.
        alpha: float. The update is scaled by `alpha / rank`, as in PEFT. Defaults to `rank`.
        dropout: float in `[0, 1)`. Fraction of the adapter's input that is dropped during training.
            The adapter of the embedding has no dropout. Defaults to 0.
        name: string. Name of the adapter. Defaults to "default".

    Raises:
        ValueError: If an argument is out of range, no layer matches a target, a matching layer is
            quantized to something other than int8 or int4, the name is taken, or the active adapter
            is merged.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=8, targets=["query", "value", "gate"], alpha=16, dropout=0.05)
    model.compile(optimizer="adam")
    model.fit(["The hare was asleep.", "The tortoise was not."], verbose=0)
    ```
    """
    alpha = rank if alpha is None else alpha
    check_integer("rank", rank)
    check_number("alpha", alpha, above=0)
    check_number("dropout", dropout, minimum=0, below=1)
    paths = injection.match_targets(
        backbone_of(model), DEFAULT_TARGETS if targets is None else targets
    )
    adapter = Adapter(int(rank), float(alpha), float(dropout), dict.fromkeys(paths))
    add_adapter(model, name, adapter)


def use(model: keras.Model, name: str | None) -> None:
    """Switch to another adapter, or to the model without an adapter.

    Adapters with the same layers, rank, alpha and dropout share their variables, so that switching
    between them compiles nothing.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.
        name: string. Name of the adapter, or None for no adapter.

    Raises:
        ValueError: If the model has no adapter of this name, or the active adapter is merged.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=4, name="tales")
    lora.add(model, rank=4, name="letters")
    lora.use(model, "tales")
    lora.use(model, None)
    ```
    """
    state = unmerged_state(model)
    if name is not None and name not in state.stored:
        raise ValueError(
            f"`name` must be None or one of {list(state.stored)}. Received: name={name!r}"
        )
    if name != state.active:
        switch_adapter(model, name)


def remove(model: keras.Model, name: str) -> None:
    """Delete an adapter from the model. If it is the active one, no adapter is active afterwards.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.
        name: string. Name of the adapter.

    Raises:
        ValueError: If the model has no adapter of this name, or the active adapter is merged.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=4, name="tales")
    lora.remove(model, "tales")
    print(lora.names(model))  # []
    ```
    """
    state = unmerged_state(model)
    if name not in state.stored:
        raise ValueError(f"`name` must be one of {list(state.stored)}. Received: name={name!r}")
    if name == state.active:
        use(model, None)
    del state.stored[name]


def save_adapter(
    model: keras.Model,
    folder: str | os.PathLike,
    name: str | None = None,
    base_model: str | None = None,
) -> None:
    """Save one adapter without its base weights, in float32 and in the format of PEFT.

    `peft.PeftModel.from_pretrained(base, folder)` loads the result. If the model has a privacy
    ledger, it is written to the same folder.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.
        folder: string or path. Created if it does not exist. If saving fails, its former content is
            unchanged.
        name: string. Name of the adapter. Defaults to the active one.
        base_model: string. Name or folder of the Hugging Face checkpoint that the adapter's config
            names as its base. Defaults to the preset that the model was loaded from, if any.

    Raises:
        ValueError: If the model has no adapter of this name, or `folder` or one above it is a file.
        OSError: If the files cannot be written.

    Warns:
        UserWarning: If other weights than the adapter's are trainable, which are not saved.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=4)
    lora.save_adapter(model, "my_adapter")
    ```
    """
    backbone, state = backbone_of(model), adapter_state(model)
    name = state.active if name is None else name
    if name not in state.stored:
        raise ValueError(f"`name` must be one of {names(model)}. Received: name={name!r}")
    _warn_of_trained_base(backbone)
    revision = None
    if base_model is None:
        base_model, revision = presets.hugging_face_name(getattr(backbone, "preset", None))
    with backend.all_gathered(backbone.trainable_variables) as writes:
        if writes:
            adapter = adapter_with_values(backbone, name)
            ledger = backbone.privacy.ledger
            write_adapter(folder, adapter, backbone.get_config(), base_model, ledger, revision)


def _warn_of_trained_base(backbone):
    layers = injection.adaptable_layers(backbone).values()
    factors = {id(v) for layer in layers for v in layer.lora_factors}
    paths = [v.path for v in backbone.trainable_weights if id(v) not in factors]
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        warnings.warn(
            "`save_adapter` saves the adapter alone, but other weights are trainable, too, and "
            f"would be lost: {', '.join(paths[:3])}{more}. Save all of them with "
            "`model.save_to_preset`, `model.save` or `model.save_weights`, or freeze them before "
            "you train (`layer.trainable = False`).",
            stacklevel=3,
        )


def load_adapter(model: keras.Model, folder: str | os.PathLike, name: str = "default") -> None:
    """Load an adapter that `save_adapter` or PEFT saved, and make it the active one.

    Its factors are trainable.
    The entries of a privacy ledger in the same folder are added to the model's ledger.

    Args:
        model: `VaultGemmaCausalLM` or `VaultGemmaBackbone`.
        folder: string or path. Folder with `adapter_config.json` and `adapter_model.safetensors`,
            or `hf://org/name[@revision]`, a repository of Hugging Face with these files.
        name: string. Name of the adapter in this model. Defaults to "default".

    Raises:
        ValueError: If the name is taken, the active adapter is merged, the adapter belongs to a
            model of another shape (the message names the tensor and both shapes) or is not plain
            LoRA, or a file is missing, truncated or malformed. The model is then unchanged.
        FileNotFoundError: If the repository is gated or cannot be downloaded.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, lora

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=4)
    lora.save_adapter(model, "my_adapter")

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.load_adapter(model, "my_adapter", name="tales")
    print(lora.active(model))  # tales
    ```
    """
    if os.fspath(folder).startswith("hf://"):
        folder = hubs.from_hugging_face(os.fspath(folder), [CONFIG, WEIGHTS, presets.LEDGER])
    adapter = read_adapter(folder, backbone_of(model).get_config())
    ledger = preset_ledger(folder)
    add_adapter(model, name, adapter)
    backbone_of(model).privacy.add(ledger)
