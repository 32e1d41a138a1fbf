"""Strings to padded ids and next-token labels: one path, NumPy out, on every backend."""

import keras
import keras_hub
import numpy as np

from keras_vaultgemma import backend, ids, presets, saving
from keras_vaultgemma.backbone import VaultGemmaBackbone
from keras_vaultgemma.tokenizer import VaultGemmaTokenizer


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Tokenise, add `<bos>` and `<eos>`, pad or cut to `sequence_length`, and shift by one for the labels.

    Called on a string, a list or array of strings, or inside `tf.data.Dataset.map`, it returns `(x, y, sample_weight)`:
    `x = {"token_ids", "padding_mask"}` and `y`, `sample_weight`, all int32 [B, sequence_length] (without B for a single
    string). A text that is cut gets no `<eos>`: it does not end there.

    Args:
        tokenizer: `VaultGemmaTokenizer`.
        sequence_length: length of padded rows.
        add_start_token, add_end_token: whether training rows get `<bos>` and `<eos>`.

    Raises:
        ValueError: when called on anything that is not a string or a non-empty list of strings.
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

    def call(self, x, y=None, sample_weight=None, sequence_length=None):
        length = sequence_length or self.sequence_length
        if backend.is_symbolic_tensorflow(x):
            shape = (*x.shape, length)
            token_ids, padding_mask, y, sample_weight = backend.in_tensorflow_graph(
                lambda texts: self._pack_for_training(texts, length), [x], [shape] * 4, ["int32"] * 4
            )
        else:
            token_ids, padding_mask, y, sample_weight = self._pack_for_training(x, length)
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, sample_weight

    def _pack_for_training(self, texts, length):
        texts, is_single = as_texts(texts)
        start = [self.tokenizer.start_token_id] if self.add_start_token else []
        end = [self.tokenizer.end_token_id] if self.add_end_token else []
        # One more than the length: the last label.
        rows = [start + row + end for row in self.tokenizer.tokenize(texts)]
        token_ids, mask = ids.pad(rows, length + 1, self.tokenizer.pad_token_id)
        arrays = [token_ids[:, :-1], mask[:, :-1], token_ids[:, 1:], mask[:, 1:]]
        return [array[0] for array in arrays] if is_single else arrays

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
