"""Gemma's SentencePiece tokenizer: strings to token ids and back."""

from typing import Any

import keras
import keras_hub

from keras_vaultgemma import backend
from keras_vaultgemma.data.text_inputs import TURN_END, check_unicode
from keras_vaultgemma.models.backbone import VaultGemmaBackbone
from keras_vaultgemma.models.preset_io import TokenizerIO


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaTokenizer(TokenizerIO, keras_hub.tokenizers.SentencePieceTokenizer):
    """Gemma's SentencePiece tokenizer.

    `tokenizer("text")` returns token ids, `tokenizer.detokenize(ids)` returns text. A literal
    "<bos>", "<eos>" or "<pad>" in the text is tokenized as ordinary text, so that no input can end
    a document. "<start_of_turn>" and "<end_of_turn>" are single tokens wherever they occur.

    Args:
        proto: string or bytes. Path of a SentencePiece model, or its contents.
        **kwargs: Arguments of `keras_hub.tokenizers.SentencePieceTokenizer`.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaTokenizer

    tokenizer = VaultGemmaTokenizer.from_preset("vaultgemma_tiny")
    ids = tokenizer("Once upon a time")
    text = tokenizer.detokenize(ids)
    ```
    """

    backbone_cls = VaultGemmaBackbone

    def __init__(self, proto: str | bytes | None = None, **kwargs: Any) -> None:
        self._add_special_token("<bos>", "start_token")
        self._add_special_token("<eos>", "end_token")
        self._add_special_token("<pad>", "pad_token")
        super().__init__(proto=proto, **kwargs)
        # `quantize` rejects a model that has a layer which is not built, and this one has nothing
        # to build.
        self.built = True

    def in_graph(self):
        """Return tensorflow-text's tokenizer with this vocabulary, for the graph being traced."""
        self._check_vocabulary()
        return backend.sentencepiece_in_graph(self.proto, self.add_bos, self.add_eos)

    def tokenize(self, inputs):
        """Return the token ids of strings; a string with a surrogate raises ValueError.

        Inside a TensorFlow graph, such as a `tf.data` map, these are operations of tensorflow-text,
        and the ids of several strings are a ragged tensor.
        """
        if backend.is_symbolic_tensorflow(inputs) and "int" in self.compute_dtype:
            ids = backend.tokenize_in_graph(self.in_graph(), inputs)
            if self.sequence_length is None:
                return ids
            return backend.pad_in_graph(ids, self.sequence_length, self.pad_token_id)
        for text in inputs if isinstance(inputs, (list, tuple)) else [inputs]:
            if isinstance(text, str):
                check_unicode(text, "`inputs`")
        return super().tokenize(inputs)

    @property
    def end_of_turn_id(self):
        """Id of "<end_of_turn>", or None if the vocabulary has no such piece."""
        token = self.token_to_id(TURN_END)
        return None if self.id_to_token(token) != TURN_END else token
