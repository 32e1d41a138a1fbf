"""VaultGemma in Keras 3: one model for JAX, TensorFlow and PyTorch."""

__version__ = "0.1.0"

__all__ = [
    "TrainingCheckpoint",
    "VaultGemmaBackbone",
    "VaultGemmaCausalLM",
    "VaultGemmaCausalLMPreprocessor",
    "VaultGemmaTokenizer",
    "apply_chat_template",
    "privacy",
]

try:
    # First: it settles the backend before Keras is imported, and keeps keras-hub from importing TensorFlow.
    from keras_vaultgemma import backend  # noqa: F401
except (ImportError, ValueError) as error:
    # Raised by the first name that is asked for, so that the command line can start and say it in one line.
    _no_backend = error

    def __getattr__(name):
        raise _no_backend
else:
    from keras_vaultgemma import privacy
    from keras_vaultgemma.backbone import VaultGemmaBackbone
    from keras_vaultgemma.causal_lm import VaultGemmaCausalLM
    from keras_vaultgemma.checkpointing import TrainingCheckpoint
    from keras_vaultgemma.preprocessor import VaultGemmaCausalLMPreprocessor
    from keras_vaultgemma.tokenizer import VaultGemmaTokenizer, apply_chat_template
