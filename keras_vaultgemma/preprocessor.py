"""Strings to padded ids and next-token labels: one path, NumPy out, on every backend."""

import itertools

import keras
import keras_hub
import numpy as np

from keras_vaultgemma import backend, ids, presets, saving
from keras_vaultgemma.backbone import VaultGemmaBackbone
from keras_vaultgemma.tokenizer import VaultGemmaTokenizer, as_chats, chat_parts


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Tokenise, add `<bos>` and `<eos>`, pad or cut to `sequence_length`, and shift by one for the labels.

    It is called on samples of one kind:
    - a string, or a list or array of strings: every token is learnt;
    - `{"prompts": strings, "responses": strings}`: the responses and `<eos>` are;
    - a chat, a list of `{"role", "content"}`, or a list of chats: the model's turns and their `<end_of_turn>` are; a
      chat ends there, without `<eos>`;
    or on the first two inside `tf.data.Dataset.map`. It returns `(x, y, sample_weight)`: `x = {"token_ids",
    "padding_mask"}` and `y`, `sample_weight`, all int32 [B, sequence_length] (without B for a single sample);
    `sample_weight` is 1 where the label is to be learnt. A text that is cut gets no `<eos>`: it does not end there.

    Args:
        tokenizer: `VaultGemmaTokenizer`.
        sequence_length: length of padded rows.
        add_start_token, add_end_token: whether training rows get `<bos>` and `<eos>`.

    Raises:
        ValueError: when called on anything else, on an empty list, on prompts and responses of different numbers, or
            on a chat in which the model says nothing.
    """

    backbone_cls = VaultGemmaBackbone
    tokenizer_cls = VaultGemmaTokenizer

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Load the preprocessor of a preset; `**kwargs` replace its arguments, such as `sequence_length`.

        For a Hugging Face folder `sequence_length` is the model's `max_position_embeddings`.
        """
        folder = presets.find(preset, "vocabulary")
        if presets.is_keras(folder):
            with backend.without_tensorflow():
                return super().from_preset(str(folder), **kwargs)
        length = presets.read_json(folder / presets.CONFIG).get("max_position_embeddings", 1024)
        return cls(VaultGemmaTokenizer.from_preset(folder), **{"sequence_length": length, **kwargs})

    def save_to_preset(self, preset_dir):
        """Save into a folder, as `VaultGemmaCausalLM.save_to_preset` does."""
        with saving.written_beside(preset_dir) as folder, backend.without_tensorflow():
            super().save_to_preset(str(folder))

    def build(self, input_shape=None):
        self.built = True

    def call(self, x, y=None, sample_weight=None, sequence_length=None, cut_rows=None):
        """Samples to `(x, y, sample_weight)`; `y` and `sample_weight` are not read.

        Args:
            cut_rows: `training_data.CutRows` that is told of the rows, or None.
        """
        length = sequence_length or self.sequence_length
        texts = x.get("prompts") if isinstance(x, dict) else x
        if backend.is_symbolic_tensorflow(texts):
            token_ids, padding_mask, y, sample_weight = backend.in_tensorflow_graph(
                lambda *values: self._pack_for_training(keras.tree.pack_sequence_as(x, values), length, cut_rows),
                keras.tree.flatten(x),
                [(*texts.shape, length)] * 4,
                ["int32"] * 4,
            )
        else:
            token_ids, padding_mask, y, sample_weight = self._pack_for_training(x, length, cut_rows)
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, sample_weight

    def _pack_for_training(self, x, length, cut_rows):
        samples, has_end, is_single = as_samples(x)
        start, end = self.special_ids
        end = end if has_end else []
        pieces = iter(self.tokenizer.tokenize([part for parts in samples for part in parts]))
        rows, learnt = [], []
        for parts in samples:
            row, is_learnt = [*start], [0] * len(start)
            for i, piece in enumerate(itertools.islice(pieces, len(parts))):
                row += piece
                is_learnt += [i % 2] * len(piece)
            rows.append(row + end)
            learnt.append(is_learnt + [1] * len(end))
        # One more than the length: the last label.
        token_ids, mask = ids.pad(rows, length + 1, self.tokenizer.pad_token_id)
        weights, _ = ids.pad(learnt, length + 1)
        if cut_rows is not None:
            cut_rows.count(rows, weights[:, 1:])
        arrays = [token_ids[:, :-1], mask[:, :-1], token_ids[:, 1:], weights[:, 1:]]
        return [array[0] for array in arrays] if is_single else arrays

    @property
    def special_ids(self):
        """The ids that training rows begin with and end with, a list of one or none each."""
        start = [self.tokenizer.start_token_id] if self.add_start_token else []
        return start, [self.tokenizer.end_token_id] if self.add_end_token else []

    def tokenize_prompts(self, texts):
        """A list of strings to rows of ids, each with `<bos>` first."""
        return [[self.tokenizer.start_token_id, *row] for row in self.tokenizer.tokenize(texts)]

    def generate_preprocess(self, x, sequence_length=None):
        """Prompts to `{"token_ids", "padding_mask"}`, int32 [B, sequence_length].

        Raises:
            ValueError: for a prompt longer than `sequence_length`.
        """
        length = sequence_length or self.sequence_length
        texts, is_single = as_texts(x)
        rows = self.tokenize_prompts(texts)
        ids.check_lengths(rows, length)
        token_ids, mask = ids.pad(rows, length, self.tokenizer.pad_token_id)
        token_ids, mask = (token_ids[0], mask[0]) if is_single else (token_ids, mask)
        return {"token_ids": token_ids, "padding_mask": mask}

    def generate_postprocess(self, x):
        """`{"token_ids", "padding_mask"}` [B, T] to a list of strings, padding and control tokens left out."""
        arrays = (keras.ops.convert_to_numpy(x[key]) for key in ("token_ids", "padding_mask"))
        return self.detokenize(ids.unpad(*arrays))

    def detokenize(self, rows):
        """Rows of ids to a list of strings, control tokens left out."""
        control = set(self.tokenizer.special_token_ids)
        return [self.tokenizer.detokenize([i for i in row if i not in control]) for row in rows]


def as_samples(x):
    """What the preprocessor is called on, as `(samples, has_end, is_single)`.

    Returns:
        samples: a list of strings for each sample, by turns what is given and what is to be learnt.
        has_end: whether they end with `<eos>`.
        is_single: whether `x` was a single sample.
    """
    if isinstance(x, dict):
        if set(x) != {"prompts", "responses"}:
            raise ValueError(
                "A dict must have the keys 'prompts' and 'responses', or 'token_ids' and 'padding_mask'. "
                f"Received: {sorted(x)}"
            )
        (prompts, is_single), (responses, _) = as_texts(x["prompts"]), as_texts(x["responses"])
        if len(prompts) != len(responses):
            raise ValueError(
                "`prompts` and `responses` must be as many as each other. "
                f"Received: {len(prompts)} prompts and {len(responses)} responses"
            )
        return [list(pair) for pair in zip(prompts, responses, strict=True)], True, is_single
    chats, is_single = as_chats(x)
    if not chats:
        texts, is_single = as_texts(x)
        return [["", text] for text in texts], True, is_single
    # What follows the last answer teaches nothing.
    samples = [chat_parts(chat)[:-1] for chat in chats]
    for i, parts in enumerate(samples):
        if not parts:
            raise ValueError(f"A chat must have a message of the model to learn. Received: none in chat {i}")
    return samples, False, is_single


def as_texts(x):
    """(list of strings, whether `x` was a single one) from a string, bytes, a list or tuple or array of them.

    Raises:
        ValueError: for an empty list or an item that is not a string, which it names.
    """
    if backend.is_tensorflow(x):
        x = x.numpy()
    if isinstance(x, np.ndarray):
        x = x.tolist()
    is_single = isinstance(x, (str, bytes))
    items = [x] if is_single else x
    if not isinstance(items, (list, tuple)) or not len(items):
        raise ValueError(f"Input must be a string or a non-empty list of strings. Received: {x!r}")
    texts = [item.decode("utf-8") if isinstance(item, bytes) else item for item in items]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Every item must be a string. Received: item {i} is {text!r} ({type(text).__name__})")
    return texts, is_single
