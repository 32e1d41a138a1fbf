"""The task: a head on the backbone, loading and saving, and generation. What trains it is in fine_tuning.py."""

import keras
import keras_hub
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma._files import new_folder
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.generation.generator import Generator
from keras_vaultgemma.generation.prompt_lookup import PromptLookup
from keras_vaultgemma.generation.requests import complete, concatenate, make_request
from keras_vaultgemma.generation.search import SearchGenerator
from keras_vaultgemma.generation.stream import Stream
from keras_vaultgemma.models.backbone import VaultGemmaBackbone
from keras_vaultgemma.models.preprocessor import VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.models.trainer import FineTuning
from keras_vaultgemma.privacy.ledger import preset_ledger


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaCausalLM(FineTuning, keras_hub.models.CausalLM):
    """VaultGemma with its language-model head, which is the embedding in reverse.

    ```python
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.generate("Once upon a time", max_new_tokens=40)
    model.fit(["a text", "another text"])
    ```

    Args:
        backbone: `VaultGemmaBackbone`.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None to work on ids.
        **kwargs: as for `keras_hub.models.CausalLM`.
    """

    backbone_cls = VaultGemmaBackbone
    preprocessor_cls = VaultGemmaCausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, **kwargs):
        self.backbone = backbone
        self.preprocessor = preprocessor
        self._generators = {}
        super().__init__(
            inputs=backbone.input, outputs=self.logits(backbone(backbone.input)), **kwargs
        )

    def logits(self, hidden_states):
        """Hidden states [B, T, D] to logits [B, T, V], float32, soft-capped where the backbone says so."""
        return ops.cast(self.backbone.token_embedding(hidden_states, reverse=True), "float32")

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Load a model from a bundled preset's name, a folder (Keras or Hugging Face format), `hf://` or `kaggle://`.

        Args:
            preset: string or path.
            load_weights: False builds the architecture with random weights.
            **kwargs: `dtype` for the backbone; `preprocessor=None` to do without vocabulary.

        Raises:
            ValueError: for an unknown preset, a config this model cannot represent, or weights that do not fit.
            FileNotFoundError: where weights or vocabulary are missing; it says how to get them.
        """
        wants_text = "preprocessor" not in kwargs
        folder = presets.find(
            preset, "weights" if load_weights else "vocabulary" if wants_text else "config"
        )
        if wants_text and not presets.file(folder, "vocabulary"):
            files = ", ".join(presets.FILES["vocabulary"])
            raise FileNotFoundError(
                f"{preset} has no vocabulary ({files}). Pass `preprocessor=None` to work on ids"
            )
        backbone_kwargs = {"dtype": kwargs.pop("dtype")} if "dtype" in kwargs else {}
        if "backbone" not in kwargs:
            backbone = VaultGemmaBackbone.from_preset(folder, load_weights, **backbone_kwargs)
            if load_weights:  # the backbone was given a folder, by which the release is not known
                backbone.privacy.add(preset_ledger(folder, preset, backbone.count_params()))
            kwargs["backbone"] = backbone
        if wants_text:
            kwargs["preprocessor"] = VaultGemmaCausalLMPreprocessor.from_preset(folder)
        return cls(**kwargs)

    def save_to_preset(self, preset_dir, max_shard_size=10):
        """Save into a folder that a `from_preset` of this package or keras-hub loads: whole, or not at all.

        Args:
            preset_dir: made, with the folders above it, where it does not exist.
            max_shard_size: gigabytes of a weights file at most.

        Raises:
            ValueError or OSError: where nothing can be written there.
        """
        with backend.all_gathered(self.variables) as writes:
            if writes:
                with new_folder(preset_dir) as folder, backend.without_tensorflow():
                    super().save_to_preset(str(folder), max_shard_size=max_shard_size)
                    self.privacy.ledger.write(folder)

    def generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=None,
        *,
        max_new_tokens=None,
        stop=(),
        seed=None,
        repetition_penalty=1.0,
        min_p=0.0,
        logit_bias=None,
        prompt_lookup=False,
        return_log_probs=False,
        return_finish_reason=False,
    ):
        """Continue prompts with the sampler given to `compile`.

        Args:
            inputs: one of
                - a string, or a list or array of strings: each gets `<bos>` and comes back as a string;
                - a chat, a list of `{"role", "content"}` (or a list of chats): comes back as the model's reply;
                - ids without a vocabulary: a list or array of ints, or several;
                - `{"token_ids", "padding_mask"}`, int [B, T], padded on either side: comes back as such a dict;
                - a `tf.data.Dataset` of these or of batches of them: comes back as one batch.
            max_length: tokens of a row at most, prompt included. Defaults to the preprocessor's `sequence_length`; for
                ids to T.
            stop_token_ids: ids that end a row; None for none; "auto" for `<eos>`, in chats also `<end_of_turn>`.
            strip_prompt: return what was generated without the prompt. Defaults to True for chats, else to False.
            max_new_tokens: tokens to generate at most, instead of `max_length`.
            stop: strings that end a row, of any number of tokens, looked for in what is generated alone: none begins in
                the prompt. Text ends before the first of them; ids end with the token that completes it.
            seed: of random samplers, from 0 to 2**31 - 1: the same seed gives a prompt the same text, whatever else is
                in the batch; the same prompt twice in a batch gives two texts. Defaults to going on from the sampler's
                own seed.
            repetition_penalty: above 1, tokens that have occurred become less likely (Keskar et al., 2019).
            min_p: from 0 to 1; tokens less likely than this times the most likely one are left out (Nguyen et al.,
                2024).
            logit_bias: `{id: number added to its logit}`; -inf forbids a token.
            prompt_lookup: read what the text repeats several tokens at a time; for greedy decoding of text that quotes
                its prompt. The same text, sooner (prompt_lookup.py).
            return_log_probs, return_finish_reason: return a `GenerationOutput` that has these too.

        Returns:
            As `inputs`: a string, a list of strings, or a dict of NumPy arrays; in a `GenerationOutput` if asked for.

        Raises:
            ValueError: for no prompts, a prompt longer than `max_length`, items that are not strings, ids outside the
                vocabulary, both lengths, or another argument out of its range.
        """
        options = dict(
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            repetition_penalty=repetition_penalty,
            min_p=min_p,
            logit_bias=logit_bias,
        )
        output_options = (strip_prompt, return_log_probs, return_finish_reason)

        def generate(inputs, as_batch=False):
            request = make_request(inputs, self.backbone, self.preprocessor, **options)
            if as_batch:
                request = request._replace(asked=request.asked._replace(is_single=False))
            return complete(
                self._generator(prompt_lookup), request, self.preprocessor, *output_options
            )

        if backend.is_tensorflow(inputs) and hasattr(inputs, "as_numpy_iterator"):
            return concatenate(
                [generate(batch, as_batch=True) for batch in inputs.as_numpy_iterator()]
            )
        return generate(inputs)

    def stream(
        self, inputs, max_length=None, stop_token_ids="auto", *, prompt_lookup=False, **options
    ):
        """Iterate over the text that follows one prompt while it is generated.

        ```python
        for piece in model.stream("Once upon a time", max_new_tokens=40):
            print(piece, end="", flush=True)
        ```

        Args:
            inputs: a string or a chat.
            max_length, stop_token_ids, prompt_lookup: as for `generate`.
            **options: `max_new_tokens`, `stop`, `seed`, `repetition_penalty`, `min_p` and `logit_bias`, as for
                `generate`.

        Returns:
            `completion.Stream`, an iterator of strings. Joined they are `generate(..., strip_prompt=True)`.

        Raises:
            ValueError: as `generate`, and for more than one prompt.
        """
        request = make_request(
            inputs,
            self.backbone,
            self.preprocessor,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            **options,
        )
        if not request.asked.is_single or request.asked.form not in ("text", "chat"):
            raise ValueError(
                f"`inputs` of `stream` must be one string or one chat. Received: {inputs!r}"
            )
        return Stream(self._generator(prompt_lookup), request, self.preprocessor)

    def _generator(self, prompt_lookup=False):
        """The compiled generator, made anew where variables were added or replaced (LoRA, quantisation)."""
        chooses_by_itself = type(self.sampler).__call__ is keras_hub.samplers.Sampler.__call__
        kind = (
            PromptLookup if prompt_lookup else Generator if chooses_by_itself else SearchGenerator
        )
        generator = self._generators.get(kind)
        if generator is None or [id(v) for v in generator.variables] != [
            id(v) for v in self.variables
        ]:
            self._generators[kind] = generator = kind(self, self.sampler, self.run_eagerly)
        return generator
