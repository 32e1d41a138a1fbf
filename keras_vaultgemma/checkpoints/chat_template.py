"""The chat template of an exported model: Gemma's turns, or what the source has of its own."""

from keras_vaultgemma._files import check_link, read_json

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Turns must alternate user/assistant/..., without a system role') }}\
{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
"""`apply_chat_template` in Jinja, after `<bos>`, as transformers and servers expect it."""

TURNS = ["<start_of_turn>", "<end_of_turn>"]

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
"""Files in which transformers stores a template: version 5 in the first, earlier ones in the
second."""


def turn_ids(tokenizer):
    """Return the ids of the two turn markers, or [] if the vocabulary does not have both."""
    ids = [tokenizer.token_to_id(text) for text in TURNS]
    return ids if [tokenizer.id_to_token(i) for i in ids] == TURNS else []


def chat_template(folder, tokenizer):
    """Return the template of a folder in Hugging Face's format, else Gemma's, or None.

    Args:
        folder: `pathlib.Path` of a checkpoint of any format.
        tokenizer: `VaultGemmaTokenizer`. Without turn markers it has no Gemma template.
    """
    for name in (TEMPLATE_FILE, CONFIG_FILE):
        if (folder / name).is_file():
            check_link(folder / name, folder)
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if (folder / CONFIG_FILE).is_file():
        template = read_json(folder / CONFIG_FILE).get("chat_template")
        if isinstance(template, str):
            return template
    return CHAT_TEMPLATE if turn_ids(tokenizer) else None
