"""VaultGemma in Keras 3: one model for JAX, TensorFlow and PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

from keras_vaultgemma._startup import choose_backend, hide_tensorflow
from keras_vaultgemma._version import __version__

if TYPE_CHECKING:
    from keras_vaultgemma import evaluation, lora, privacy
    from keras_vaultgemma.data.packing import PackedDataset
    from keras_vaultgemma.data.text_inputs import apply_chat_template
    from keras_vaultgemma.generation.requests import GenerationOutput
    from keras_vaultgemma.models.backbone import VaultGemmaBackbone
    from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM
    from keras_vaultgemma.models.preprocessor import VaultGemmaCausalLMPreprocessor
    from keras_vaultgemma.models.tokenizer import VaultGemmaTokenizer
    from keras_vaultgemma.recipes.compare import compare
    from keras_vaultgemma.recipes.convert import convert
    from keras_vaultgemma.recipes.describe import describe
    from keras_vaultgemma.recipes.finetune import finetune
    from keras_vaultgemma.training.checkpoint import TrainingCheckpoint

__all__ = [
    "GenerationOutput",
    "PackedDataset",
    "TrainingCheckpoint",
    "VaultGemmaBackbone",
    "VaultGemmaCausalLM",
    "VaultGemmaCausalLMPreprocessor",
    "VaultGemmaTokenizer",
    "__version__",
    "apply_chat_template",
    "compare",
    "convert",
    "describe",
    "evaluation",
    "finetune",
    "lora",
    "privacy",
]

# Here, because a program may import Keras or keras-hub before it uses a name of this package.
choose_backend()
hide_tensorflow()

# Imported on first access, because Keras and its backend take seconds to import.
_MODULES = ("evaluation", "lora", "privacy")
_SOURCES = {
    "GenerationOutput": "generation.requests",
    "PackedDataset": "data.packing",
    "TrainingCheckpoint": "training.checkpoint",
    "VaultGemmaBackbone": "models.backbone",
    "VaultGemmaCausalLM": "models.causal_lm",
    "VaultGemmaCausalLMPreprocessor": "models.preprocessor",
    "VaultGemmaTokenizer": "models.tokenizer",
    "apply_chat_template": "data.text_inputs",
    "compare": "recipes.compare",
    "convert": "recipes.convert",
    "describe": "recipes.describe",
    "finetune": "recipes.finetune",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # First, because it rejects an unknown backend before Keras is imported.
    importlib.import_module(f"{__name__}.backend")
    value = getattr(importlib.import_module(f"{__name__}.{_SOURCES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
