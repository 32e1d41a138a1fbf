"""Description of a preset, from its small files."""

import contextlib
import os
import textwrap
from collections import Counter

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import names, presets, weight_map
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.data.text_inputs import TURN_END, TURN_START
from keras_vaultgemma.models.tokenizer import VaultGemmaTokenizer
from keras_vaultgemma.privacy.accounting import SEEDED
from keras_vaultgemma.privacy.ledger import preset_ledger

WIDTH, LABEL = 100, 26
"""Columns of a description, and of the labels in it."""


def describe(preset: str | os.PathLike) -> str:
    """Describe the architecture, parameters, tokenizer and privacy of a preset.

    Reads small files only; no weights are downloaded.

    Args:
        preset: string or path. The name of a bundled preset, a folder or a handle (`hf://`,
            `kaggle://`).

    Returns:
        String of several lines.

    Raises:
        ValueError: If the preset does not exist, or its config.json describes no VaultGemma.
        FileNotFoundError: If the files cannot be downloaded.

    Example:

    ```python
    from keras_vaultgemma import describe

    print(describe("vaultgemma_tiny"))
    ```
    """
    name = names.canonical(preset)
    folder = _find(name)
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
    lines = [name, *textwrap.wrap(str(metadata.get("description", "")), WIDTH)]
    for title, section in sections.items():
        lines += ["", title, *_table(section)]
    return "\n".join(lines)


def _find(preset):
    """Return the folder of a preset, without its weights.

    Hugging Face repositories are downloaded file by file, so the vocabulary is requested as well;
    a repository without one is described too.
    """
    if preset.startswith("hf://"):
        with contextlib.suppress(FileNotFoundError):
            return presets.find(preset, "vocabulary")
    return presets.find(preset, "config")


def _vocabulary(folder):
    if not presets.file(folder, "vocabulary"):
        return "no vocabulary"
    tokenizer = VaultGemmaTokenizer.from_preset(folder)
    special = {
        token: tokenizer.token_to_id(token)
        for token in ("<pad>", "<eos>", "<bos>", TURN_START, TURN_END)
    }
    # SentencePiece returns the id of <unk> for an unknown piece.
    known = {token: i for token, i in special.items() if tokenizer.id_to_token(i) == token}
    return {"pieces": tokenizer.vocabulary_size(), **known}


def _privacy(metadata):
    """Return the privacy statement of a preset.

    A preset without one is not described as trained without privacy, because that is not known.
    """
    if "privacy" not in metadata:
        return "no statement"
    return metadata["privacy"] or "not privately trained"


def _private_runs(ledger):
    """Return a section for the training runs of a ledger, with the total ε of each dataset."""
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
    """Return the lines of a section, which is a sentence or a dict of labels to values."""
    if not isinstance(section, dict):
        return [f"  {section}"]
    lines = []
    for name, value in section.items():
        lines += textwrap.wrap(
            f"  {name:{LABEL}}{value}", WIDTH, subsequent_indent=" " * (2 + LABEL)
        )
    return lines
