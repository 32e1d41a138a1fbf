"""Canaries of a run: invented records among its training data, for an audit afterwards."""

from keras_vaultgemma.data.text_files import TextRecords
from keras_vaultgemma.evaluation.canaries import insert_canaries, read_canaries
from keras_vaultgemma.models.tokenizer import VaultGemmaTokenizer

LENGTH = 32
"""Tokens of a canary, or half of a row if rows are short: its text may have a few more."""


def with_canaries(records, path, config):
    """Return `TextRecords` with canaries, those of the file of a run that resumes."""
    if records.prompts is not None or not isinstance(records.texts[0], str):
        raise ValueError(
            "`canaries` must be None unless records are texts, not pairs or chats. "
            f"Received: canaries={config.canaries}"
        )
    length = config.sequence_length or 2 * LENGTH
    if path.is_file():
        texts = records.texts + included_canaries(path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = insert_canaries(
            records.texts,
            path,
            count=config.canaries,
            length=max(2, min(LENGTH, length // 2)),
            tokenizer=VaultGemmaTokenizer.from_preset(config.preset),
        )
    groups = records.groups
    if groups is not None:  # each canary is a user
        groups = groups + [f"canary {i}" for i in range(len(texts) - len(groups))]
    return TextRecords(texts, None, groups=groups)


def included_canaries(path):
    """Return the canaries of a sealed file that were trained on."""
    sealed = read_canaries(path)
    return [canary for canary, is_in in zip(sealed.canaries, sealed.is_in, strict=True) if is_in]
