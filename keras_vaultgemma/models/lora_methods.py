"""The LoRA methods that keras-hub gives every backbone, and adapters in configs and weights."""

from keras_vaultgemma.lora import keras_format
from keras_vaultgemma.lora.adapters import DEFAULT_TARGETS, add


class LoraMethods:
    """Mixin of a backbone: `enable_lora` and its companions in keras-hub's interface.

    Configs and files of weights have the adapters, except those of presets, which are merged.
    """

    def default_lora_layer_names(self):
        """Return the names of the layers that `enable_lora` adapts by default."""
        return list(DEFAULT_TARGETS)

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
        add(self, rank, target_layer_names, alpha, dropout, name)

    def save_lora_weights(self, filepath):
        raise NotImplementedError(
            "Use `lora.save_adapter(model, folder)`, which writes the format that PEFT loads"
        )

    def load_lora_weights(self, filepath):
        raise NotImplementedError(
            "Use `lora.load_adapter(model, folder)`, which also loads adapters that PEFT wrote"
        )

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.privacy.is_in_weights:
            keras_format.save(self, store)

    def load_own_variables(self, store):
        values = dict(store)
        own = {key: values.pop(key) for key in [*values] if key.startswith(keras_format.PREFIX)}
        super().load_own_variables(values)
        keras_format.load(self, own)

    def get_config(self):
        found = {}
        if self.privacy.is_in_weights:
            found["adapters"] = keras_format.describe(self)
            found["trainable_weights"] = keras_format.trainable_weights(self)
        found = {name: value for name, value in found.items() if value is not None}
        return {**super().get_config(), **found}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        adapters, trainable = (config.pop(key, None) for key in ("adapters", "trainable_weights"))
        backbone = super().from_config(config)
        if adapters is not None:
            keras_format.rebuild(backbone, adapters)
            backbone.trainable = config.get("trainable", True)
        if trainable is not None:
            keras_format.freeze_all_but(backbone, trainable)
        return backbone
