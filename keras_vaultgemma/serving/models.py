"""The models of a server: one base, alone and with each of its adapters, under their names."""

import time

from keras_vaultgemma import backend
from keras_vaultgemma.generation.batch_loop import TOP
from keras_vaultgemma.generation.continuous_batch import ContinuousBatch
from keras_vaultgemma.generation.prompt_scores import PromptScorer
from keras_vaultgemma.lora import adapters
from keras_vaultgemma.lora.alignment import align
from keras_vaultgemma.lora.peft_format import read_adapter
from keras_vaultgemma.lora.state import add_adapter
from keras_vaultgemma.models.pieces import with_piece_logits
from keras_vaultgemma.serving.errors import RequestError


class Models:
    """One base model and its adapters.

    The adapters get one shape, so that switching compiles nothing (`lora.alignment`).

    Args:
        model: `VaultGemmaCausalLM` without an adapter.
        name: string. Name of the model without an adapter.
        folders: dict. `{name: folder}` of adapters.

    Attributes:
        model: the model.
        created: int. Time at which the models were loaded, in seconds since 1970.
    """

    def __init__(self, model, name, folders):
        self.model = model
        self.created = int(time.time())
        self.base = name
        names = list(folders)
        if name in folders:
            raise ValueError(f"An adapter must have another name than the model. Received: {name}")
        if folders:
            config = model.backbone.get_config()
            aligned, neutral = align([read_adapter(folders[name], config) for name in names])
            for adapter, adapter_name in zip(aligned, names, strict=True):
                add_adapter(model, adapter_name, adapter)
            add_adapter(model, name, neutral)
        self.names = [name, *names]
        self.active = name
        self._scorer = None

    def check(self, name):
        """Raise RequestError if there is no model of a name."""
        if name is None:
            raise RequestError(400, "`model` must be given", "model")
        if name not in self.names:
            raise RequestError(
                404,
                f"There is no model {name[:100]!r}. There are: {', '.join(self.names)}",
                "model",
                "model_not_found",
            )

    def use(self, name):
        """Activate the adapter of a model."""
        if name != self.active:
            adapters.use(self.model, name)
            self.active = name

    def batch(self, max_rows):
        """Return an empty `ContinuousBatch`."""
        return ContinuousBatch(with_piece_logits(self.model), max_rows)

    def score_prompt(self, ids):
        """Return the `PromptScores` of ids under the active model."""
        if self._scorer is None:
            variables = list(self.model.variables)

            def compile(function, **options):
                return backend.compile_function(function, variables, **options)

            self._scorer = PromptScorer(with_piece_logits(self.model), compile, TOP)
        return self._scorer(ids)
