"""LoRA adapters of a model: add, switch, merge, save and load.

A LoRA adapter adds a trainable low-rank update to frozen weight matrices. A layer with an adapter
computes `x W + s (x A) B`, where A has the shape `[in, r]`, B has the shape `[r, out]`, r is the
rank and `s = alpha / r`.

A model can hold several named adapters, of which at most one is active. The factors of the active
adapter are float32 variables of the layers; the factors of the others wait in host memory.

Every function takes a `VaultGemmaCausalLM` or a `VaultGemmaBackbone`. Pass the `VaultGemmaCausalLM`
if you generate, train or predict with it, because its compiled functions must be discarded when the
adapter's variables change. An optimizer belongs to the variables that it was built for: call
`compile` before you train after such a change.

References:
    - [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
"""

# First, because it selects the Keras backend before Keras is imported.
from keras_vaultgemma import backend as backend
from keras_vaultgemma.lora.adapters import (
    active,
    add,
    load_adapter,
    names,
    remove,
    save_adapter,
    use,
)
from keras_vaultgemma.lora.merging import merge, unmerge

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
