"""Loading and saving of presets: the one `from_preset` and `save_to_preset` of the model's classes.

A preset is a folder of files: a config, weights, a vocabulary and a privacy ledger. What differs
between a backbone, a task, a preprocessor and a tokenizer is which of these files it needs and how
it is built from them. That is all the four subclasses of `PresetIO` define.
"""

import contextlib
import inspect
import json
import os
from typing import Any, Self

import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma._files import new_folder, read_json
from keras_vaultgemma._validation import check_known
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.config_fields import KERAS_FIELDS
from keras_vaultgemma.checkpoints.dtypes import saved_policy
from keras_vaultgemma.checkpoints.reader import KerasOnly, open_values, warn_if_not_finite
from keras_vaultgemma.checkpoints.vocabulary import read_vocabulary
from keras_vaultgemma.layers.hyperparameters import SHAPES
from keras_vaultgemma.lora.injection import adaptable_layers, saving_merged
from keras_vaultgemma.lora.state import backbone_of, unmerged_state
from keras_vaultgemma.privacy.ledger import preset_ledger
from keras_vaultgemma.privacy.ledger_writer import PrivacyRecord


class PresetIO:
    """Mixin that loads and saves presets. It precedes the keras-hub class among the bases."""

    @classmethod
    def from_preset(
        cls, preset: str | os.PathLike, load_weights: bool = True, **kwargs: Any
    ) -> Self:
        """Load from a preset.

        Args:
            preset: string or path. A bundled preset's name, a folder in Keras or Hugging Face
                format, `hf://org/name[@revision]` or
                `kaggle://org/model/framework/variation[/version]`.
            load_weights: bool. If False, the architecture gets random weights and only the small
                files are needed. Defaults to True.
            **kwargs: Constructor arguments that replace the preset's. `dtype` defaults to Keras's
                global policy, or to the preset's own if that is mixed or quantized. A causal
                language model also takes `preprocessor=None`, to work on token ids without a
                vocabulary, and the arguments of its backbone.

        Returns:
            An instance of the class.

        Raises:
            TypeError: If the class has no such argument, or an argument changes the shape of
                weights that are to be loaded.
            ValueError: If the preset is unknown, its config describes another model, or its weights
                do not fit.
            FileNotFoundError: If weights or vocabulary are missing. The message says how to get
                them.

        Example:

        ```python
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny", dtype="bfloat16")
        ```
        """
        known = sorted({"load_weights", *cls._preset_arguments()})
        check_known(f"{cls.__name__}.from_preset", kwargs, known)
        folder = presets.find(preset, cls._required_files(load_weights, kwargs))
        return cls._load(folder, preset, load_weights, kwargs)

    @classmethod
    def _preset_arguments(cls):
        """Return the names of the constructor arguments that `from_preset` takes."""
        names = {"name", "trainable", "dtype"}
        for base in cls.__mro__:
            # Keras's own bases take no more than these, and keras-hub's and ours name theirs.
            is_ours = base.__module__.partition(".")[0] in ("keras_vaultgemma", "keras_hub")
            if is_ours and "__init__" in vars(base):
                names |= {
                    name
                    for name, parameter in inspect.signature(base.__init__).parameters.items()
                    if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
                }
        return names - {"self", "initial_values", "proto"}

    def save_to_preset(self, preset_dir: str | os.PathLike, **kwargs: Any) -> None:
        """Save into a folder that `from_preset` of this package and of keras-hub loads.

        The folder is complete when this returns and unchanged if it raises.

        Args:
            preset_dir: string or path. Created, with its parents, if it does not exist.
            **kwargs: For models `max_shard_size`, the largest size of a weights file in gigabytes.
                Defaults to 10.

        Raises:
            ValueError: If `preset_dir` or a folder above it is a file.
            OSError: If nothing can be written there.

        Example:

        ```python
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        model.save_to_preset("my_preset")
        model = VaultGemmaCausalLM.from_preset("my_preset")
        ```
        """
        with backend.all_gathered(getattr(self, "variables", [])) as writes:
            if writes:
                with new_folder(preset_dir) as folder:
                    super().save_to_preset(str(folder), **kwargs)
                    self._save_more(folder)

    def _save_more(self, folder):
        """Save what keras-hub does not know of."""

    @classmethod
    def _load_by_keras_hub(cls, folder, **kwargs):
        presets.check_links(folder)
        return super().from_preset(str(folder), **kwargs)


@contextlib.contextmanager
def _vocabulary_of(folder):
    """Raise ValueError that names the file for errors of the libraries that read a vocabulary."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:  # SentencePiece raises RuntimeError, TensorFlow an error of its own.
        path = presets.file(folder, "vocabulary")
        raise ValueError(f"{path} is damaged: it is no SentencePiece model: {error}") from error


class TokenizerIO(PresetIO):
    """`PresetIO` of a tokenizer."""

    @classmethod
    def _required_files(cls, load_weights, kwargs):
        return "vocabulary"

    @classmethod
    def _load(cls, folder, preset, load_weights, kwargs):
        with _vocabulary_of(folder):
            if presets.is_keras(folder):
                return cls._load_by_keras_hub(folder, **kwargs)
            return cls(proto=read_vocabulary(folder), **kwargs)


class PreprocessorIO(PresetIO):
    """`PresetIO` of a preprocessor."""

    @classmethod
    def _required_files(cls, load_weights, kwargs):
        return "vocabulary"

    @classmethod
    def _load(cls, folder, preset, load_weights, kwargs):
        if presets.is_keras(folder):
            with _vocabulary_of(folder):
                return cls._load_by_keras_hub(folder, **kwargs)
        length = read_json(folder / presets.CONFIG).get("max_position_embeddings", 1024)
        tokenizer = cls.tokenizer_cls.from_preset(folder)
        return cls(tokenizer, **{"sequence_length": length, **kwargs})


class _ModelIO(PresetIO):
    """`PresetIO` of what has weights, and so a privacy ledger that belongs to them."""

    def save_to_preset(self, preset_dir: str | os.PathLike, **kwargs: Any) -> None:
        # keras-hub would reject a file of weights that has anything else in it.
        layers = adaptable_layers(backbone_of(self)).values()
        with self.privacy.in_its_own_file(), saving_merged(layers):
            super().save_to_preset(preset_dir, **kwargs)

    save_to_preset.__doc__ = PresetIO.save_to_preset.__doc__

    def _save_more(self, folder):
        self.privacy.ledger.write(folder)
        # keras-hub records the name of the first base of VaultGemmaCausalLM, which is a mixin.
        path = folder / presets.METADATA
        metadata = {**read_json(path), "tasks": ["CausalLM"]}
        path.write_text(json.dumps(metadata, indent=4), encoding="utf-8")


class BackboneIO(_ModelIO):
    """`PresetIO` of a backbone, which also owns the privacy record of its weights."""

    @property
    def privacy(self):
        """`PrivacyRecord` of the private data that the weights were trained on."""
        if not hasattr(self, "_privacy_record"):
            self._privacy_record = PrivacyRecord()
        return self._privacy_record

    def save_own_variables(self, store):
        """Write the ledger into every file that Keras writes weights into, but for presets."""
        super().save_own_variables(store)
        if self.privacy.is_in_weights:
            store[presets.LEDGER] = np.frombuffer(self.privacy.everything.lines(), "uint8")

    def load_own_variables(self, store):
        """Read the ledger that comes with weights."""
        saved = {name: store[name] for name in [*store.keys()]}
        lines = saved.pop(presets.LEDGER, None)
        super().load_own_variables(saved)
        if lines is not None:
            self.privacy.add_copied(np.array(lines).tobytes(), "weights")
        else:
            self.privacy.add_unknown("`load_weights` of a file without a ledger")

    def set_weights(self, weights):
        unmerged_state(self)  # or `lora.unmerge` would bring back other weights than these
        super().set_weights(weights)
        self.privacy.add_unknown("`set_weights`")

    @classmethod
    def _required_files(cls, load_weights, kwargs):
        return "weights" if load_weights else "config"

    @classmethod
    def _load(cls, folder, preset, load_weights, kwargs):
        config = read_json(folder / presets.CONFIG)["config"] if presets.is_keras(folder) else {}
        if kwargs.get("dtype") is None and (policy := saved_policy(config)) is not None:
            kwargs = {**kwargs, "dtype": policy}
        values = None
        try:
            if load_weights:
                hyperparameters, values = open_values(folder)
                _check_shapes(hyperparameters, kwargs)
            else:
                hyperparameters = read_config(folder)
        except KerasOnly:
            _check_shapes(read_config(folder), kwargs)
            backbone = cls._load_by_keras_hub(folder, load_weights=load_weights, **kwargs)
        else:
            identity = {name: config[name] for name in ("name", "trainable") if name in config}
            if "num_layers" in kwargs and "layer_types" not in kwargs:
                hyperparameters.pop("layer_types")  # a list of the preset's own length
            arguments = {**hyperparameters, **identity, **kwargs}
            backbone = cls(**arguments, initial_values=values)
        if load_weights:
            backbone.preset = os.fspath(preset)
            warn_if_not_finite(backbone, values)
            # Instead of what keras-hub's loading has recorded, which does not know the preset.
            backbone._privacy_record = PrivacyRecord(
                preset_ledger(folder, preset, backbone.count_params())
            )
        return backbone


class CausalLMIO(_ModelIO):
    """`PresetIO` of a causal language model."""

    def set_weights(self, weights):
        unmerged_state(self)  # or `lora.unmerge` would bring back other weights than these
        super().set_weights(weights)
        self.privacy.add_unknown("`set_weights`")

    @classmethod
    def _preset_arguments(cls):
        return super()._preset_arguments() | KERAS_FIELDS.keys()

    @classmethod
    def _required_files(cls, load_weights, kwargs):
        if load_weights:
            return "weights"
        return "config" if "preprocessor" in kwargs else "vocabulary"

    @classmethod
    def _load(cls, folder, preset, load_weights, kwargs):
        takes_text = "preprocessor" not in kwargs
        if takes_text and not presets.file(folder, "vocabulary"):
            files = ", ".join(presets.FILES["vocabulary"])
            raise FileNotFoundError(
                f"{preset} has no vocabulary ({files}). Pass `preprocessor=None` to work on ids"
            )
        backbone_kwargs = {
            name: kwargs.pop(name) for name in (*KERAS_FIELDS, "dtype") if name in kwargs
        }
        if "backbone" in kwargs and backbone_kwargs:
            raise TypeError(
                f"`{next(iter(backbone_kwargs))}` belongs to the backbone, and `backbone` has its "
                "own. Pass one of them"
            )
        if "backbone" not in kwargs:
            kwargs["backbone"] = cls.backbone_cls._load(
                folder, preset, load_weights, backbone_kwargs
            )
        if takes_text:
            kwargs["preprocessor"] = cls.preprocessor_cls.from_preset(folder)
        return cls(**kwargs)


def _check_shapes(hyperparameters, kwargs):
    """Raise TypeError if an argument asks for another shape than the weights have."""
    for name in SHAPES:
        if name in kwargs and kwargs[name] != hyperparameters[name]:
            raise TypeError(
                f"`{name}` must be {hyperparameters[name]}, for which the preset has weights, "
                f"unless load_weights=False. Received: {name}={kwargs[name]!r}"
            )


def preset_hyperparameters(preset):
    """Return a preset's constructor arguments of `VaultGemmaBackbone`, from its config alone."""
    return read_config(presets.find(preset, "config"))
