"""LoRA adapters of a model: add, switch, merge, save and load."""

from keras_vaultgemma.lora.adapters import (
    active,
    add,
    load_adapter,
    merge,
    names,
    remove,
    save_adapter,
    unmerge,
    use,
)

__all__ = [
    "active",
    "add",
    "load_adapter",
    "merge",
    "names",
    "remove",
    "save_adapter",
    "unmerge",
    "use",
]
