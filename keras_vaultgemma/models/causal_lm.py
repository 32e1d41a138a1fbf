"""The causal language model: a head on the backbone, generation, training and scoring."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma._validation import check_known
from keras_vaultgemma.generation.requests import (
    GenerationConfig,
    complete,
    concatenate,
    make_request,
)
from keras_vaultgemma.generation.selection import find_generator, restore_sampler
from keras_vaultgemma.generation.stream import Stream
from keras_vaultgemma.generation.validation import check_no_unknown, check_outside_graph
from keras_vaultgemma.models.backbone import VaultGemmaBackbone
from keras_vaultgemma.models.causal_lm_trainer import CausalLMTrainer
from keras_vaultgemma.models.cloning import LayerwiseCloning
from keras_vaultgemma.models.compiled_functions import CompiledFunctions
from keras_vaultgemma.models.export import Export
from keras_vaultgemma.models.pieces import check_piece_count, with_piece_logits
from keras_vaultgemma.models.preprocessor import VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.models.preset_io import CausalLMIO
from keras_vaultgemma.models.quantization import Quantization
from keras_vaultgemma.training.scoring import Scoring


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaCausalLM(
    CausalLMIO,
    Quantization,
    Export,
    LayerwiseCloning,
    CompiledFunctions,
    CausalLMTrainer,
    Scoring,
    keras_hub.models.CausalLM,
):
    """VaultGemma with its language-model head, which is the transposed embedding.

    Called on `{"token_ids", "padding_mask"}`, int32 of shape `[B, T]` each, it returns logits,
    float32 of shape `[B, T, V]`. `generate`, `stream`, `fit`, `evaluate` and `score` take strings.

    Args:
        backbone: `VaultGemmaBackbone`.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None to work on token ids. Defaults to
            None.
        **kwargs: Arguments of `keras_hub.models.CausalLM`.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM

    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    print(model.generate("Once upon a time", max_new_tokens=8))
    model.fit(["The fox said no.", "The crow said yes."], batch_size=2, verbose=0)
    ```
    """

    backbone_cls = VaultGemmaBackbone
    preprocessor_cls = VaultGemmaCausalLMPreprocessor

    def __init__(
        self,
        backbone: VaultGemmaBackbone,
        preprocessor: VaultGemmaCausalLMPreprocessor | None = None,
        **kwargs: Any,
    ) -> None:
        check_piece_count(preprocessor, backbone.vocabulary_size)
        # Keras's functional models ignore arguments that they do not know.
        check_known(type(self).__name__, kwargs, ("compile", "name", "trainable"))
        self.backbone = backbone
        self.preprocessor = preprocessor
        outputs = self.logits(backbone(backbone.input))
        super().__init__(inputs=backbone.input, outputs=outputs, **kwargs)

    @property
    def privacy(self):
        """`PrivacyRecord` of the private data that the weights were trained on."""
        return self.backbone.privacy

    def hidden_states(self, inputs, training=None):
        """Return the last hidden states, of shape `[B, T, D]`, in the compute dtype."""
        return self.backbone(inputs, training=training)

    def logits(self, hidden_states):
        """Return logits, float32 of shape `[B, T, V]`, for hidden states of shape `[B, T, D]`."""
        return ops.cast(self.backbone.token_embedding(hidden_states, reverse=True), "float32")

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        strip_prompt: bool | None = None,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        min_p: float = 0.0,
        logit_bias: dict[int, float] | None = None,
        prompt_lookup: bool = False,
        return_log_probs: bool = False,
        return_finish_reason: bool = False,
        length_penalty: float | None = None,
        **unknown: Any,
    ) -> Any:
        """Continue prompts with the sampler given to `compile`.

        Prompts of different lengths share a batch, and each gets the text it would get alone.

        Args:
            inputs: One of

                - a string, or a list or array of strings. `<bos>` is added, and strings are
                  returned;
                - a chat, which is a list of `{"role", "content"}`, or a list of chats. The model's
                  reply is returned;
                - a list or array of token ids, or several of these;
                - `{"token_ids", "padding_mask"}`, int arrays of shape `[B, T]`, padded on either
                  side. Such a dict is returned;
                - a `tf.data.Dataset` of these or of batches of them, which is returned as one
                  batch.
            max_length: int. Maximum number of tokens of a row, prompt included. Defaults to the
                preprocessor's `sequence_length`; for padded ids to T.
            stop_token_ids: list of ints, None for none, or "auto" for `<eos>` and, in chats,
                `<end_of_turn>`. Ids that end a row. Defaults to "auto".
            strip_prompt: bool. If True, return the generated part only. Defaults to True for chats
                and to False otherwise.
            max_new_tokens: int. Maximum number of generated tokens; replaces `max_length`.
            stop: string or list of strings that end a row. They are searched for in the generated
                part only. Returned text ends before the first of them; returned ids end with the
                token that completes it.
            seed: int from 0 to 2**31 - 1, for random samplers. With the same seed a prompt gets the
                same text, whatever else is in the batch; equal prompts in one batch get different
                texts. Defaults to continuing the sampler's own seed.
            repetition_penalty: float above 0. Above 1, tokens that have occurred become less
                likely ([Keskar et al., 2019](https://arxiv.org/abs/1909.05858)). Defaults to 1.
            min_p: float from 0 to 1. Tokens less likely than this fraction of the most likely one
                are excluded ([Nguyen et al., 2024](https://arxiv.org/abs/2407.01082)). Defaults
                to 0.
            logit_bias: dict `{token id: number added to its logit}`; -inf forbids a token.
            prompt_lookup: bool. If True, decode greedily with prompt-lookup speculation, which
                returns the same text sooner where the text repeats itself. Defaults to False.
            return_log_probs: bool. If True, return a `GenerationOutput` with log-probabilities.
            return_finish_reason: bool. If True, return a `GenerationOutput` with finish reasons.
            length_penalty: float, for beam search. A hypothesis is scored by its log-probability
                divided by its number of new tokens to this power. Defaults to 1, their mean; 0
                compares sums.
            **unknown: Rejected, with the name of what to use instead.

        Returns:
            A string, a list of strings, a list of ids or a dict of NumPy arrays, according to
            `inputs`; a `GenerationOutput` of it if log-probabilities or finish reasons are
            requested.

        Raises:
            ValueError: If there is no prompt, a prompt is longer than `max_length`, an item is not
                a string, an id is outside the vocabulary, both lengths are given, another argument
                or an attribute of the sampler is out of its range, or logits are not finite.
            TypeError: If an argument is unknown, such as `temperature`, which the sampler has.

        Example:

        ```python
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        model.compile(sampler="top_p")
        texts = model.generate(["The fox said", "In the garden"], max_new_tokens=8, seed=7)
        ```
        """
        if unknown:
            check_no_unknown("generate", unknown, _names(self.generate))
        check_outside_graph("generate", inputs)
        config = GenerationConfig(
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            stop=stop,
            seed=seed,
            repetition_penalty=repetition_penalty,
            min_p=min_p,
            logit_bias=logit_bias,
            length_penalty=length_penalty,
        )
        output_options = (strip_prompt, return_log_probs, return_finish_reason)

        def generate(inputs, as_batch=False):
            request = make_request(inputs, self.backbone, self.preprocessor, config)
            if as_batch:
                request = request._replace(prompts=request.prompts._replace(is_single=False))
            generator = self._generator(prompt_lookup, length_penalty)
            return complete(generator, request, self.preprocessor, *output_options)

        if backend.is_tensorflow(inputs) and hasattr(inputs, "as_numpy_iterator"):
            return concatenate([generate(batch, True) for batch in inputs.as_numpy_iterator()])
        return generate(inputs)

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        *,
        prompt_lookup: bool = False,
        **options: Any,
    ) -> Stream:
        """Iterate over the text that follows one prompt while it is generated.

        Args:
            inputs: string or chat.
            max_length: int, as for `generate`.
            stop_token_ids: list of ints, None or "auto", as for `generate`.
            prompt_lookup: bool, as for `generate`.
            **options: `max_new_tokens`, `stop`, `seed`, `repetition_penalty`, `min_p`,
                `logit_bias` and `length_penalty`, as for `generate`.

        Returns:
            `Stream`, an iterator of strings. Joined, they are what
            `generate(..., strip_prompt=True)` returns.

        Raises:
            ValueError, TypeError: As `generate`, and if there is more than one prompt.

        Example:

        ```python
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        for piece in model.stream("Once upon a time", max_new_tokens=8):
            print(piece, end="", flush=True)
        ```
        """
        known = list(dict.fromkeys([*_names(self.stream), *_names(GenerationConfig)]))
        check_no_unknown("stream", {k: v for k, v in options.items() if k not in known}, known)
        check_outside_graph("stream", inputs)
        config = GenerationConfig(max_length=max_length, stop_token_ids=stop_token_ids, **options)
        request = make_request(inputs, self.backbone, self.preprocessor, config)
        if not request.prompts.is_single or request.prompts.form not in ("text", "chat"):
            raise ValueError(
                f"`inputs` of `stream` must be one string or one chat. Received: {inputs!r}"
            )
        generator = self._generator(prompt_lookup, config.length_penalty)
        return Stream(generator, request, self.preprocessor)

    def _generator(self, prompt_lookup=False, length_penalty=None):
        """Return the compiled generator for the sampler."""
        model = with_piece_logits(self)
        return find_generator(model, self._generators, prompt_lookup, length_penalty)

    def get_config(self):
        # In a dict of this name, which keras-hub leaves out of presets: a file of a whole model
        # keeps its sampler, and a preset has none.
        sampler = keras.saving.serialize_keras_object(self.sampler)
        return {**super().get_config(), "compile_config": {"sampler": sampler}}

    @classmethod
    def from_config(cls, config):
        compiled = config.get("compile_config", {})
        model = super().from_config({k: v for k, v in config.items() if k != "compile_config"})
        if compiled.get("sampler"):
            model.sampler = restore_sampler(compiled["sampler"])
        return model


def _names(function):
    """Return the names of the arguments of a function, without `**`."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
