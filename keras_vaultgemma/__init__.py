"""VaultGemma in Keras 3: one model for JAX, TensorFlow and PyTorch."""

from keras_vaultgemma.backbone import VaultGemmaBackbone
from keras_vaultgemma.causal_lm import VaultGemmaCausalLM
from keras_vaultgemma.preprocessor import VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.tokenizer import VaultGemmaTokenizer, apply_chat_template

__version__ = "0.1.0"

__all__ = [
    "VaultGemmaBackbone",
    "VaultGemmaCausalLM",
    "VaultGemmaCausalLMPreprocessor",
    "VaultGemmaTokenizer",
    "apply_chat_template",
]
