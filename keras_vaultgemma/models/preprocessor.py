"""Strings to padded token ids and next-token labels, as NumPy arrays on every backend."""

import itertools
from typing import Any

import keras
import keras_hub

from keras_vaultgemma import backend
from keras_vaultgemma._validation import check_choice
from keras_vaultgemma.data.containers import as_plain
from keras_vaultgemma.data.text_inputs import TURN_END, TURN_START, as_samples, as_texts
from keras_vaultgemma.data.token_ids import check_lengths, pad_rows, unpad_rows
from keras_vaultgemma.data.truncation import TRUNCATE, TurnMarkers, fit_parts
from keras_vaultgemma.models.backbone import VaultGemmaBackbone
from keras_vaultgemma.models.preset_io import PreprocessorIO
from keras_vaultgemma.models.tokenizer import VaultGemmaTokenizer


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaCausalLMPreprocessor(PreprocessorIO, keras_hub.models.CausalLMPreprocessor):
    """Preprocessor for causal language modelling.

    It tokenizes, adds `<bos>` and `<eos>`, pads or truncates to `sequence_length`, and shifts by
    one token for the labels. Samples of one call are all of one kind:

    - a string, or a list or array of strings: every token is trained on;
    - `{"prompts": strings, "responses": strings}`: the responses and their `<eos>` are trained on;
    - a chat, which is a list of `{"role", "content"}`, or a list of chats: the model's turns and
      their `<end_of_turn>` are trained on. A chat ends there, without `<eos>`;
    - a pandas or polars `DataFrame` or `Series`, an Arrow table, a Hugging Face `Dataset` or
      `Column`, a dict of columns, or a list of rows. Columns are "text", "messages" (chats), or
      "prompt" and "completion" or "response", which are strings or messages.

    Strings and pairs also work inside `tf.data.Dataset.map`. A text that is truncated gets no
    `<eos>`, because it does not end there. Of pairs and chats that are longer than a row, what
    precedes the last answer is cut, because nothing can be learned from a row without its answer.
    An answer that is longer than a row by itself is truncated like a text, after at most half a row
    of its prompt.

    Args:
        tokenizer: `VaultGemmaTokenizer`.
        sequence_length: int. Length T of padded rows. Defaults to 1,024.
        add_start_token: bool. If True, training rows begin with `<bos>`. Defaults to True.
        add_end_token: bool. If True, training rows end with `<eos>`. Defaults to True.
        truncate: string. Where to cut pairs and chats that are longer than a row: "prompt_start",
            the beginning of the prompt; "prompt_end", its end; or "row_end", the end of the row,
            with which answers are lost. Turn markers of a chat are kept; its first turns are left
            out before the prompt of its last answer is cut. Defaults to "prompt_start".

    Call returns:
        Tuple `(x, y, sample_weight)`: `x = {"token_ids", "padding_mask"}`, and all arrays int32 of
        shape `[B, T]` (`[T]` for a single sample). `sample_weight` is 1 where the label `y` is
        trained on.

    Raises:
        ValueError: When called on another type, on an empty list, on different numbers of prompts
            and responses, or on a chat without a message of the model.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLMPreprocessor

    preprocessor = VaultGemmaCausalLMPreprocessor.from_preset(
        "vaultgemma_tiny", sequence_length=16
    )
    x, y, sample_weight = preprocessor(["The fox said", "In the garden"])
    ```
    """

    backbone_cls = VaultGemmaBackbone
    tokenizer_cls = VaultGemmaTokenizer

    def __init__(
        self,
        tokenizer: VaultGemmaTokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        truncate: str = "prompt_start",
        **kwargs: Any,
    ) -> None:
        check_choice("truncate", truncate, TRUNCATE)
        super().__init__(tokenizer, sequence_length, add_start_token, add_end_token, **kwargs)
        self.truncate = truncate

    @classmethod
    def from_config(cls, config):
        # Version 0.1.0 saved no `truncate` and cut the end of a row.
        return super().from_config({"truncate": "row_end", **config})

    def get_config(self):
        return {**super().get_config(), "truncate": self.truncate}

    def build(self, input_shape=None):
        self.built = True

    def call(self, x, y=None, sample_weight=None, sequence_length=None, truncations=None):
        """Return `(x, y, sample_weight)` for raw samples. See the class.

        Args:
            x: raw samples.
            y: ignored.
            sample_weight: ignored.
            sequence_length: int. Length of padded rows. Defaults to the preprocessor's.
            truncations: `TruncationCounter` that counts truncated rows, or None.
        """
        length = sequence_length or self.sequence_length
        x = as_plain(x)
        texts = x.get("prompts") if isinstance(x, dict) else x
        pack = self._pack_for_training
        if backend.is_symbolic_tensorflow(texts):
            pack = self._pack_in_graph
        token_ids, padding_mask, y, sample_weight = pack(x, length, truncations)
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, sample_weight

    def _pack_in_graph(self, x, length, truncations):
        """Do what `_pack_for_training` does by TensorFlow's operations, for texts and pairs."""
        texts = x["responses"] if isinstance(x, dict) else x
        prompts = x["prompts"] if isinstance(x, dict) else backend.empty_texts_like(x)
        is_single = len(texts.shape) == 0
        tokenizer = self.tokenizer.in_graph()
        rows = [
            backend.tokenize_in_graph(tokenizer, part[None] if is_single else part)
            for part in (prompts, texts)
        ]
        token_ids, mask, weights, whole = backend.pack_pairs_in_graph(
            *rows, self.special_ids, length + 1, self.truncate, self.tokenizer.pad_token_id
        )
        arrays = [token_ids[:, :-1], mask[:, :-1], token_ids[:, 1:], weights[:, 1:]]
        if truncations is not None:
            arrays = backend.call_in_graph(
                lambda ids, splits, weights: truncations.count(
                    [ids[i:j] for i, j in itertools.pairwise(splits)], weights
                ),
                [whole.values, whole.row_splits, arrays[3]],
                arrays,
            )
        return [array[0] for array in arrays] if is_single else arrays

    def _pack_for_training(self, x, length, truncations):
        samples, has_end, is_single = as_samples(x)
        start, end = self.special_ids
        # Chats end with `<end_of_turn>`.
        end, markers = (end, None) if has_end else ([], self._turn_markers())
        # One token more than the length, because the last one is only a label.
        room = length + 1 - len(start) - len(end)
        pieces = iter(self.tokenizer.tokenize([part for parts in samples for part in parts]))
        whole, rows, trained = [], [], []
        for sample in samples:
            parts = list(itertools.islice(pieces, len(sample)))
            whole.append([*start, *itertools.chain(*parts), *end])
            if self.truncate != "row_end":
                parts = fit_parts(parts, room, self.truncate == "prompt_start", markers)
            rows.append([*start, *itertools.chain(*parts), *end])
            is_trained = (itertools.repeat(i % 2, len(part)) for i, part in enumerate(parts))
            trained.append([0] * len(start) + [*itertools.chain(*is_trained)] + [1] * len(end))
        token_ids, mask = pad_rows(rows, length + 1, self.tokenizer.pad_token_id)
        weights, _ = pad_rows(trained, length + 1)
        if truncations is not None:
            truncations.count(whole, weights[:, 1:])
        arrays = [token_ids[:, :-1], mask[:, :-1], token_ids[:, 1:], weights[:, 1:]]
        return [array[0] for array in arrays] if is_single else arrays

    def _turn_markers(self):
        """Return the `TurnMarkers` of chats, in tokens."""
        return TurnMarkers(
            *self.tokenizer.tokenize(
                [
                    f"{TURN_START}user\n",
                    f"\n{TURN_START}user\n",
                    f"{TURN_END}\n{TURN_START}model\n",
                ]
            )
        )

    @property
    def special_ids(self):
        """Tuple of two lists: the ids that training rows begin with and those they end with."""
        start = [self.tokenizer.start_token_id] if self.add_start_token else []
        return start, [self.tokenizer.end_token_id] if self.add_end_token else []

    def tokenize_prompts(self, texts):
        """Return a list of ids, beginning with `<bos>`, for each string."""
        return [[self.tokenizer.start_token_id, *row] for row in self.tokenizer.tokenize(texts)]

    def generate_preprocess(self, x, sequence_length=None):
        """Return `{"token_ids", "padding_mask"}`, int32 of shape `[B, T]`, for prompts.

        Args:
            x: string or list of strings.
            sequence_length: int. Length T of padded rows. Defaults to the preprocessor's.

        Raises:
            ValueError: If a prompt is longer than `sequence_length`.
        """
        length = sequence_length or self.sequence_length
        texts, is_single = as_texts(x)
        rows = self.tokenize_prompts(texts)
        check_lengths(rows, length)
        token_ids, mask = pad_rows(rows, length, self.tokenizer.pad_token_id)
        token_ids, mask = (token_ids[0], mask[0]) if is_single else (token_ids, mask)
        return {"token_ids": token_ids, "padding_mask": mask}

    def generate_postprocess(self, x):
        """Return a list of strings for `{"token_ids", "padding_mask"}` of shape `[B, T]`."""
        arrays = (keras.ops.convert_to_numpy(x[key]) for key in ("token_ids", "padding_mask"))
        return self.detokenize(unpad_rows(*arrays))

    def detokenize(self, rows):
        """Return a string for each list of ids, without control tokens."""
        control = set(self.tokenizer.special_token_ids)
        return [self.tokenizer.detokenize([i for i in row if i not in control]) for row in rows]
