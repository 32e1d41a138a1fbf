"""Ollama's Modelfile, which names a GGUF file and says how a chat becomes text."""

from keras_vaultgemma.checkpoints.chat_template import CHAT_TEMPLATE
from keras_vaultgemma.checkpoints.gguf_format import FILE as WEIGHTS

FILE = "Modelfile"

TURNS = '''\
TEMPLATE """{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user\
{{ end }}
{{ .Content }}<end_of_turn>
{{ end }}<start_of_turn>model
"""
PARAMETER stop <end_of_turn>
# For a model that was not trained on chats, replace the template by: TEMPLATE {{ .Prompt }}
'''
"""`chat_template.CHAT_TEMPLATE` in Ollama's language. Ollama puts `<bos>` in front by itself."""

CONTINUE = "TEMPLATE {{ .Prompt }}\n"
"""For a vocabulary without turns: text is continued."""


def modelfile(template, context_length):
    """Return the text of a Modelfile.

    Args:
        template: string. The chat template in the GGUF file, or None if it has none. Ollama
            translates one that is not Gemma's by itself.
        context_length: int. Number of tokens that the model was trained on.
    """
    turns = {CHAT_TEMPLATE: TURNS, None: CONTINUE}.get(template, "")
    return f"FROM ./{WEIGHTS}\n{turns}PARAMETER num_ctx {context_length}\n"
