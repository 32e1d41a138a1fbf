"""The LoRA methods that keras-hub gives every backbone, on top of the `lora` room."""

from keras_vaultgemma.lora import adapters


class LoraMethods:
    """Mixin of a backbone: `enable_lora` and its companions in keras-hub's interface."""

    def default_lora_layer_names(self):
        """Return the names of the layers that `enable_lora` adapts by default."""
        return list(adapters.DEFAULT_TARGETS)

    def enable_lora(self, rank, target_layer_names=None, alpha=None, dropout=0.0, name="default"):
        """Freeze the model and add a LoRA adapter to train. See `keras_vaultgemma.lora.add`.

        Args:
            rank: int. Rank r of the factors.
            target_layer_names: list of strings or None. Layer names, or regular expressions that
                match whole layer paths. Defaults to `["query", "value"]`.
            alpha: float. The update is scaled by `alpha / rank`. Defaults to `rank`.
            dropout: float. Dropout rate of the adapter's input in training. Defaults to 0.
            name: string. Name of the adapter. Defaults to "default".

        Raises:
            ValueError: If an argument is out of its range or a target matches no layer.
        """
        adapters.add(self, rank, target_layer_names, alpha, dropout, name)

    def save_lora_weights(self, filepath):
        raise NotImplementedError(
            "Use `lora.save_adapter(model, folder)`, which writes the format that PEFT loads"
        )

    def load_lora_weights(self, filepath):
        raise NotImplementedError(
            "Use `lora.load_adapter(model, folder)`, which also loads adapters that PEFT wrote"
        )
