"""Strings to padded ids and next-token labels: one path, NumPy out, on every backend."""

import itertools

import keras
import keras_hub

from keras_vaultgemma import backend
from keras_vaultgemma._files import new_folder, read_json
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.data.text_inputs import as_samples, as_texts
from keras_vaultgemma.data.token_ids import check_lengths, pad_rows, unpad_rows
from keras_vaultgemma.models.backbone import VaultGemmaBackbone
from keras_vaultgemma.models.tokenizer import VaultGemmaTokenizer


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
        length = read_json(folder / presets.CONFIG).get("max_position_embeddings", 1024)
        return cls(VaultGemmaTokenizer.from_preset(folder), **{"sequence_length": length, **kwargs})

    def save_to_preset(self, preset_dir):
        """Save into a folder, as `VaultGemmaCausalLM.save_to_preset` does."""
        with new_folder(preset_dir) as folder, backend.without_tensorflow():
            super().save_to_preset(str(folder))

    def build(self, input_shape=None):
        self.built = True

    def call(self, x, y=None, sample_weight=None, sequence_length=None, truncations=None):
        """Samples to `(x, y, sample_weight)`; `y` and `sample_weight` are not read.

        Args:
            truncations: `TruncationCounter` that is told of the rows, or None.
        """
        length = sequence_length or self.sequence_length
        texts = x.get("prompts") if isinstance(x, dict) else x
        if backend.is_symbolic_tensorflow(texts):
            token_ids, padding_mask, y, sample_weight = backend.in_tensorflow_graph(
                lambda *values: self._pack_for_training(
                    keras.tree.pack_sequence_as(x, values), length, truncations
                ),
                keras.tree.flatten(x),
                [(*texts.shape, length)] * 4,
                ["int32"] * 4,
            )
        else:
            token_ids, padding_mask, y, sample_weight = self._pack_for_training(
                x, length, truncations
            )
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, sample_weight

    def _pack_for_training(self, x, length, truncations):
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
        token_ids, mask = pad_rows(rows, length + 1, self.tokenizer.pad_token_id)
        weights, _ = pad_rows(learnt, length + 1)
        if truncations is not None:
            truncations.count(rows, weights[:, 1:])
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
        check_lengths(rows, length)
        token_ids, mask = pad_rows(rows, length, self.tokenizer.pad_token_id)
        token_ids, mask = (token_ids[0], mask[0]) if is_single else (token_ids, mask)
        return {"token_ids": token_ids, "padding_mask": mask}

    def generate_postprocess(self, x):
        """`{"token_ids", "padding_mask"}` [B, T] to a list of strings, padding and control tokens left out."""
        arrays = (keras.ops.convert_to_numpy(x[key]) for key in ("token_ids", "padding_mask"))
        return self.detokenize(unpad_rows(*arrays))

    def detokenize(self, rows):
        """Rows of ids to a list of strings, control tokens left out."""
        control = set(self.tokenizer.special_token_ids)
        return [self.tokenizer.detokenize([i for i in row if i not in control]) for row in rows]
