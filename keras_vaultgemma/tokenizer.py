"""Strings to ids and back, and the turns of a chat."""

import keras
import keras_hub

from keras_vaultgemma import backend, presets, saving
from keras_vaultgemma.backbone import VaultGemmaBackbone

TURN_START, TURN_END = "<start_of_turn>", "<end_of_turn>"
ROLES = {"user": "user", "assistant": "model", "model": "model"}
"""The roles of a chat, as users write them and as Gemma does."""


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
        with saving.written_beside(preset_dir) as folder, backend.without_tensorflow():
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


def apply_chat_template(messages, add_generation_prompt=False):
    """A conversation in Gemma's format: each turn `<start_of_turn>role\\ncontent<end_of_turn>\\n`.

    `<bos>` is not part of the string: tokenizing adds it.

    Args:
        messages: list of `{"role": …, "content": …}`; roles alternate, "user" first, then "assistant" (or "model").
        add_generation_prompt: open the model's next turn at the end.

    Raises:
        ValueError: names the message that is empty of a key, out of turn, or holds a turn marker in its content (which
            would let one speaker write another's turn).
    """
    return "".join(chat_parts(messages)) + (f"{TURN_START}model\n" if add_generation_prompt else "")


def chat_parts(messages):
    """What `apply_chat_template` joins: strings, by turns what is given and what the model answers.

    An answer ends with its `<end_of_turn>`. What is given before it is, to the character, what `generate` continues.
    """
    if not messages:
        raise ValueError("`messages` must be a list of one or more messages. Received: an empty one")
    parts = [""]
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"`messages[{i}]` must be a dict with 'role' and 'content'. Received: {message!r}")
        role, content = ROLES.get(message["role"]), message["content"]
        if role != ("user", "model")[i % 2]:
            raise ValueError(
                f"`messages[{i}]` must have the role {('user', 'assistant')[i % 2]!r}: Gemma knows no system role, and "
                f"its turns alternate. Received: role={message['role']!r}"
            )
        if not isinstance(content, str) or TURN_START in content or TURN_END in content:
            raise ValueError(
                f"The content of `messages[{i}]` must be a string without {TURN_START} or {TURN_END}. "
                f"Received: {content!r}"
            )
        opening, said = f"{TURN_START}{role}\n", f"{content.strip()}{TURN_END}"
        if role == "model":
            parts[-1] += opening
            parts += [said, "\n"]
        else:
            parts[-1] += f"{opening}{said}\n"
    return parts


def as_chats(x):
    """(list of chats, whether `x` was a single one) from a chat or a list of chats; (None, False) for anything else."""
    if not isinstance(x, (list, tuple)) or not len(x) or not isinstance(x[0], (dict, list, tuple)):
        return None, False
    return ([x], True) if isinstance(x[0], dict) else (x, False)
