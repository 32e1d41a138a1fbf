"""The task: a head on the backbone, and what users do with it: generate, fit, evaluate, predict, score."""

import contextlib
import functools

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_vaultgemma import backend, checkpointing, completion, distribution, ids, presets, saving, training_data
from keras_vaultgemma.backbone import VaultGemmaBackbone
from keras_vaultgemma.generation import Generator
from keras_vaultgemma.loss import cross_entropy, head_factors
from keras_vaultgemma.preprocessor import VaultGemmaCausalLMPreprocessor, as_texts
from keras_vaultgemma.prompt_lookup import PromptLookup
from keras_vaultgemma.search import SearchGenerator

SCORED_ROWS = 32
"""Rows that `score` computes at a time."""


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaCausalLM(keras_hub.models.CausalLM):
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
        self._returns_hidden_states = False
        super().__init__(inputs=backbone.input, outputs=self.logits(backbone(backbone.input)), **kwargs)

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
        folder = presets.find(preset, "weights" if load_weights else "vocabulary" if wants_text else "config")
        if wants_text and not presets.file(folder, "vocabulary"):
            files = ", ".join(presets.FILES["vocabulary"])
            raise FileNotFoundError(f"{preset} has no vocabulary ({files}). Pass `preprocessor=None` to work on ids")
        backbone_kwargs = {"dtype": kwargs.pop("dtype")} if "dtype" in kwargs else {}
        if "backbone" not in kwargs:
            kwargs["backbone"] = VaultGemmaBackbone.from_preset(folder, load_weights, **backbone_kwargs)
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
        with backend.gathered(self.variables) as writes:
            if writes:
                with saving.written_beside(preset_dir) as folder, backend.without_tensorflow():
                    super().save_to_preset(str(folder), max_shard_size=max_shard_size)

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        sampler="greedy",
        gradient_checkpointing=False,
        **kwargs,
    ):
        """As `keras_hub.models.CausalLM.compile`, with other defaults.

        Args:
            loss: "auto" is cross-entropy averaged over the tokens that count, in nats, and computed without a
                [B, T, V] tensor of logits (loss.py). (Keras's own default divides by padding too, so that the same text
                has another loss in a longer row.)
            weighted_metrics: "auto" is the share of those tokens that the model ranks first. Metrics of your own are
                given logits, which then have to be computed and kept, as with a loss of your own.
            sampler: "greedy" unless given.
            gradient_checkpointing: keep only what enters each block for the backward pass and compute the rest again:
                a part of the memory, for about a third more time.
        """
        is_auto = isinstance(loss, str) and loss == "auto"
        wants_accuracy = isinstance(weighted_metrics, str) and weighted_metrics == "auto"
        had_own_metrics = not getattr(self, "_loss_takes_hidden_states", True)
        self._loss_takes_hidden_states = (
            is_auto and not kwargs.get("metrics") and (wants_accuracy or not weighted_metrics)
        )
        self._reports_accuracy = self._loss_takes_hidden_states and wants_accuracy
        if not hasattr(self, "_accuracy"):
            self._accuracy = keras.metrics.Mean(name="sparse_categorical_accuracy")
        if self._loss_takes_hidden_states:
            # Keras would trace the model once more to build what is not used. None would keep the metrics of before.
            loss, weighted_metrics = None, [] if had_own_metrics else None
        elif is_auto:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
        super().compile(optimizer, loss, weighted_metrics=weighted_metrics, sampler=sampler, **kwargs)
        self.backbone.gradient_checkpointing = gradient_checkpointing
        self._generators = {}

    @property
    def metrics(self):
        return [metric for metric in super().metrics if metric is not self._accuracy or self._reports_accuracy]

    def call(self, inputs, training=None, mask=None):
        if self._returns_hidden_states:
            return self.backbone(inputs, training=training)
        return super().call(inputs, training=training, mask=mask)

    def train_step(self, *args, **kwargs):
        with self._in_step():
            return super().train_step(*args, **kwargs)

    def test_step(self, *args, **kwargs):
        with self._in_step():
            return super().test_step(*args, **kwargs)

    @contextlib.contextmanager
    def _in_step(self):
        """Inside, the model returns hidden states, if `compute_loss` takes those."""
        self._returns_hidden_states = self._loss_takes_hidden_states
        try:
            yield
        finally:
            self._returns_hidden_states = False

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not self._returns_hidden_states:
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)
        weights = ops.ones(ops.shape(y), "float32") if sample_weight is None else ops.cast(sample_weight, "float32")
        while len(weights.shape) < len(y.shape):
            weights = weights[..., None]
        weights = ops.reshape(ops.broadcast_to(weights, ops.shape(y)), (-1,))
        total, _, is_correct = self._cross_entropy(y_pred, ops.reshape(y, (-1,)), weights, training)
        self._accuracy.update_state(is_correct, weights)
        count = ops.sum(weights)
        mean = total / ops.where(count > 0, count, 1.0)
        return mean + sum(ops.sum(loss) for loss in self.losses)

    def _cross_entropy(self, hidden_states, targets, weights, with_gradient):
        """`loss.cross_entropy` of hidden states [B, T, D] and flat targets and weights [B * T]."""
        rows = ops.reshape(hidden_states, (-1, hidden_states.shape[-1]))
        embedding = self.backbone.token_embedding
        factors = head_factors(embedding, rows)
        return cross_entropy(factors, targets, weights, embedding.logit_soft_cap, with_gradient)

    def preprocess_samples(self, x, y=None, sample_weight=None, cut_rows=None):
        """Raw samples to `(x, y, sample_weight)` for Keras; samples that are ids already pass unchanged."""
        if self.preprocessor is None or (isinstance(x, dict) and "token_ids" in x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        # Past `Layer.__call__`, which looks into every string and wraps errors.
        return self.preprocessor.call(x, cut_rows=cut_rows)

    def fit(self, x=None, y=None, batch_size=None, sample_weight=None, validation_data=None, **kwargs):
        """Train on next-token prediction; see `keras.Model.fit` for the arguments that are not explained here.

        Args:
            x: one of
                - strings;
                - `{"prompts": strings, "responses": strings}`: the loss is on the responses alone;
                - chats, lists of `{"role", "content"}`: the loss is on what the model says alone;
                - a `keras.utils.PyDataset`, generator or `tf.data.Dataset` of batches of one of these, or of packed
                  documents (packing.py);
                - `{"token_ids", "padding_mask"}` with labels `y`.
            validation_data: like `x`, or a tuple `(x, y)` or `(x, y, sample_weight)`.

        Raises:
            ValueError: for empty data, items that are not strings, ids outside the vocabulary, 16-bit weights to train,
                or a batch that the distribution which is set cannot divide among its devices.

        Warns:
            UserWarning: how many rows were longer than the preprocessor's `sequence_length` and were cut: of data in
                memory before training, of streams after it.
        """
        self._check_that_training_moves_weights()
        with training_data.CutRows() as cut_rows:
            x, y, sample_weight = self._training_data(x, y, sample_weight, batch_size, cut_rows)
            rows = kwargs.get("validation_batch_size") or batch_size
            if isinstance(validation_data, tuple):
                validation_data = self._training_data(*validation_data, batch_size=rows, cut_rows=cut_rows)
            elif validation_data is not None:
                x_val, y_val, weight_val = self._training_data(validation_data, batch_size=rows, cut_rows=cut_rows)
                validation_data = x_val if y_val is None else (x_val, y_val, weight_val)
            cut_rows.report()
            kwargs |= dict(
                x=x, y=y, batch_size=batch_size, sample_weight=sample_weight, validation_data=validation_data
            )
            with checkpointing.resumable(self, kwargs) as arguments:
                # Past keras-hub's `fit`, which needs Grain or TensorFlow to slice arrays that Keras slices itself.
                return keras.Model.fit(self, **arguments)

    def _check_that_training_moves_weights(self):
        for variable in self.trainable_variables:
            if variable.dtype in ("bfloat16", "float16"):
                raise ValueError(
                    "`fit` needs float32 weights to train, for Keras's Adam does not move 16-bit ones at all: load the "
                    'model with dtype="mixed_bfloat16" or dtype="float32", or call `backbone.enable_lora`, whose '
                    f"factors are float32. Received: {variable.path} of dtype {variable.dtype}"
                )

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        """Loss and metrics on data as for `fit`, with the same warning."""
        with training_data.CutRows() as cut_rows:
            x, y, sample_weight = self._training_data(x, y, sample_weight, batch_size, cut_rows)
            return keras.Model.evaluate(self, x=x, y=y, batch_size=batch_size, sample_weight=sample_weight, **kwargs)

    def predict(self, x, batch_size=None, **kwargs):
        """Logits, float32 [B, T, V], for data as for `fit`."""
        x, _, _ = self._training_data(x, batch_size=batch_size)
        return keras.Model.predict(self, x, batch_size=batch_size, **kwargs)

    def _training_data(self, x, y=None, sample_weight=None, batch_size=None, cut_rows=None):
        preprocess = (
            None if self.preprocessor is None else functools.partial(self.preprocess_samples, cut_rows=cut_rows)
        )
        data = training_data.prepare(x, y, sample_weight, preprocess, self.backbone.vocabulary_size)
        distribution.check_batches(data[0], batch_size)
        return data

    def score(self, token_ids, padding_mask=None, scoring_mode="loss", target_ids=None):
        """How well the model predicts each token.

        Args:
            token_ids: strings, or int [B, T].
            padding_mask: [B, T], true at tokens, or the number of each token's segment; all true if None.
            scoring_mode: "loss" or "logits".
            target_ids: int [B, T], what to predict at each place. Defaults to the next token, and then nothing is
                predicted at a segment's last token.

        Returns:
            NumPy float32. "loss": [B, T], -log p(target) in nats, 0 where nothing is predicted. "logits": [B, T, V].

        Raises:
            ValueError: for another mode or ids outside the vocabulary.
        """
        if scoring_mode not in ("loss", "logits"):
            raise ValueError(f"`scoring_mode` must be 'loss' or 'logits'. Received: {scoring_mode!r}")
        if self.preprocessor is not None and not hasattr(token_ids, "dtype"):
            texts, _ = as_texts(token_ids)
            rows = self.preprocessor.tokenize_prompts(texts)
            token_ids, padding_mask = ids.pad(rows, max(map(len, rows)))
        token_ids = np.asarray(ops.convert_to_numpy(token_ids), "int32")
        ids.check_range(token_ids, self.backbone.vocabulary_size)
        mask = np.ones_like(token_ids) if padding_mask is None else np.asarray(ops.convert_to_numpy(padding_mask))
        x = {"token_ids": token_ids, "padding_mask": mask.astype("int32")}
        if scoring_mode == "logits":
            return keras.Model.predict(self, x, verbose=0)
        if target_ids is None:
            target_ids, weights = np.roll(token_ids, -1, axis=1), (np.roll(mask, -1, axis=1) == mask) & (mask > 0)
            weights[:, -1] = False
        else:
            target_ids, weights = np.asarray(ops.convert_to_numpy(target_ids)), mask > 0
        score = backend.compile_function(self._score_rows, self.variables)
        arrays = (x["token_ids"], x["padding_mask"], target_ids.astype("int32"), weights.astype("float32"))
        batches = [[array[i : i + SCORED_ROWS] for array in arrays] for i in range(0, len(token_ids), SCORED_ROWS)]
        return np.concatenate([ops.convert_to_numpy(score(*map(backend.argument, batch))) for batch in batches])

    def _score_rows(self, token_ids, padding_mask, targets, weights):
        """[B, T], weighted losses."""
        hidden_states = self.backbone({"token_ids": token_ids, "padding_mask": padding_mask})
        targets, flat = ops.reshape(targets, (-1,)), ops.reshape(weights, (-1,))
        _, losses, _ = self._cross_entropy(hidden_states, targets, flat, with_gradient=False)
        return ops.reshape(losses, ops.shape(weights)) * weights

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
                - a `tf.data.Dataset` of batches of any of these.
            max_length: tokens of a row at most, prompt included. Defaults to the preprocessor's `sequence_length`; for
                ids to T.
            stop_token_ids: ids that end a row; None for none; "auto" for `<eos>`, in chats also `<end_of_turn>`.
            strip_prompt: return what was generated without the prompt. Defaults to True for chats, else to False.
            max_new_tokens: tokens to generate at most, instead of `max_length`.
            stop: strings that end a row, of any number of tokens. Text ends before the first of them; ids end with the
                token that completes it.
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

        def complete(inputs):
            request = completion.request(inputs, self.backbone, self.preprocessor, **options)
            return completion.complete(self._generator(prompt_lookup), request, self.preprocessor, *output_options)

        if backend.is_tensorflow(inputs) and hasattr(inputs, "as_numpy_iterator"):
            return completion.concatenate([complete(batch) for batch in inputs.as_numpy_iterator()])
        return complete(inputs)

    def stream(self, inputs, max_length=None, stop_token_ids="auto", *, prompt_lookup=False, **options):
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
        request = completion.request(
            inputs, self.backbone, self.preprocessor, max_length=max_length, stop_token_ids=stop_token_ids, **options
        )
        if not request.asked.is_single or request.asked.form not in ("text", "chat"):
            raise ValueError(f"`inputs` of `stream` must be one string or one chat. Received: {inputs!r}")
        return completion.Stream(self._generator(prompt_lookup), request, self.preprocessor)

    def _generator(self, prompt_lookup=False):
        """The compiled generator, made anew where variables were added or replaced (LoRA, quantisation)."""
        chooses_by_itself = type(self.sampler).__call__ is keras_hub.samplers.Sampler.__call__
        kind = PromptLookup if prompt_lookup else Generator if chooses_by_itself else SearchGenerator
        generator = self._generators.get(kind)
        if generator is None or [id(v) for v in generator.variables] != [id(v) for v in self.variables]:
            self._generators[kind] = generator = kind(self, self.sampler, self.run_eagerly)
        return generator
