"""What a preset is, in words, without loading its weights."""

import contextlib
import textwrap
from collections import Counter

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import presets, weight_map
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.data.text_inputs import TURN_END, TURN_START
from keras_vaultgemma.models.tokenizer import VaultGemmaTokenizer
from keras_vaultgemma.privacy.accounting import SEEDED
from keras_vaultgemma.privacy.ledger import preset_ledger

WIDTH, LABEL = 100, 26
"""Columns of a description, and of the names in it."""


def describe(preset):
    """Architecture, parameters, tokenizer and privacy of a preset, from its small files.

    Args:
        preset: a bundled preset's name, a folder, or a handle, of which no weights are downloaded.

    Returns:
        Text of several lines.

    Raises:
        ValueError: for an unknown preset, or one whose config.json does not describe a VaultGemma.
    """
    folder = _find(preset)
    architecture = read_config(folder)
    count = sum(weight.size for weight in weight_map.weight_map(architecture))
    layers = Counter(architecture["layer_types"]).items()
    metadata_file = folder / presets.METADATA
    metadata = read_json(metadata_file) if metadata_file.is_file() else {}
    sections = {
        "Architecture": {
            **architecture,
            "layer_types": ", ".join(f"{n} x {layer_type}" for layer_type, n in layers),
        },
        "Parameters": {
            "count": f"{count:,}",
            "in float32": f"{count * 4 / 1e6:,.1f} MB",
            "in bfloat16": f"{count * 2 / 1e6:,.1f} MB",
        },
        "Tokenizer": _vocabulary(folder),
        "Privacy": _privacy(metadata),
        **_private_runs(preset_ledger(folder)),
    }
    lines = [preset, *textwrap.wrap(str(metadata.get("description", "")), WIDTH)]
    for title, section in sections.items():
        lines += ["", title, *_table(section)]
    return "\n".join(lines)


def _find(preset):
    """The preset's folder; of a repository that is downloaded file by file, with the vocabulary where it has one."""
    if preset.startswith("hf://"):
        with contextlib.suppress(FileNotFoundError):
            return presets.find(preset, "vocabulary")
    return presets.find(preset, "config")


def _vocabulary(folder):
    if not presets.file(folder, "vocabulary"):
        return "no vocabulary here"
    tokenizer = VaultGemmaTokenizer.from_preset(folder)
    special = {
        token: tokenizer.token_to_id(token)
        for token in ("<pad>", "<eos>", "<bos>", TURN_START, TURN_END)
    }
    # SentencePiece gives an unknown piece the id of <unk>.
    known = {token: i for token, i in special.items() if tokenizer.id_to_token(i) == token}
    return {"pieces": tokenizer.vocabulary_size(), **known}


def _privacy(metadata):
    """What the preset says of its training; a preset that says nothing has not said that it is private or is not."""
    if "privacy" not in metadata:
        return "no statement here"
    return metadata["privacy"] or "not privately trained"


def _private_runs(ledger):
    """A section for the training that a ledger knows of, with the ε that runs on the same data amount to."""
    plain = ledger.without_privacy()
    if not ledger.runs and not plain:
        return {}
    section = {f"run {i}": sentence for i, sentence in enumerate(ledger.describe(), 1)}
    try:
        for dataset, spent in ledger.spent().items():
            mark = "" if spent.is_private else f"{SEEDED}: "
            section[f"data {dataset[:13]}"] = (
                f"{mark}ε = {spent.epsilon:g} at δ = {spent.delta:g} for {spent.unit}"
            )
    except ImportError as error:
        section["ε"] = str(error)
    if plain:
        section["without privacy"] = plain
    return {"Private training": section}


def _table(section):
    """Lines of a sentence, or of a dict with its values below each other."""
    if not isinstance(section, dict):
        return [f"  {section}"]
    lines = []
    for name, value in section.items():
        lines += textwrap.wrap(
            f"  {name:{LABEL}}{value}", WIDTH, subsequent_indent=" " * (2 + LABEL)
        )
    return lines
