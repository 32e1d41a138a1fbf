"""Strings to ids and back, and the turns of a chat."""

import keras
import keras_hub

from keras_vaultgemma import backend
from keras_vaultgemma._files import new_folder
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.data.text_inputs import TURN_END
from keras_vaultgemma.models.backbone import VaultGemmaBackbone


@keras.saving.register_keras_serializable(package="keras_vaultgemma")
class VaultGemmaTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """Gemma's SentencePiece vocabulary: `tokenizer("text")` to ids, `detokenize(ids)` to text.

    A literal "<bos>", "<eos>" or "<pad>" in text is text, not a control token, so that nobody's input can end a
    document. "<start_of_turn>" and "<end_of_turn>" are single tokens wherever they stand.

    Args:
        proto: path of a SentencePiece model, or its bytes.
        **kwargs: as for `keras_hub.tokenizers.SentencePieceTokenizer`.
    """

    backbone_cls = VaultGemmaBackbone

    def __init__(self, proto=None, **kwargs):
        self._add_special_token("<bos>", "start_token")
        self._add_special_token("<eos>", "end_token")
        self._add_special_token("<pad>", "pad_token")
        super().__init__(proto=proto, **kwargs)
        # It has nothing to build, and `quantize` refuses a model with a layer that is not.
        self.built = True

    @property
    def end_of_turn_id(self):
        """Id of "<end_of_turn>", or None where the vocabulary has no such piece."""
        token = self.token_to_id(TURN_END)
        return None if self.id_to_token(token) != TURN_END else token

    def save_to_preset(self, preset_dir):
        """Save into a folder, as `VaultGemmaCausalLM.save_to_preset` does."""
        with new_folder(preset_dir) as folder, backend.without_tensorflow():
            super().save_to_preset(str(folder))

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Load the vocabulary of a preset; see `VaultGemmaBackbone.from_preset` for what may be named.

        Raises:
            FileNotFoundError: where the preset has no vocabulary.
        """
        folder = presets.find(preset, "vocabulary")
        if presets.is_keras(folder):
            with backend.without_tensorflow():
                return super().from_preset(str(folder), **kwargs)
        return cls(proto=presets.file(folder, "vocabulary").read_bytes(), **kwargs)
