"""Fine-tuning from a data file to an adapter or a preset, as `keras-vaultgemma finetune` does it."""

from keras_vaultgemma.finetuning.recipe import finetune

__all__ = ["finetune"]
