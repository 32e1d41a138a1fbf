"""Description of a preset, from its small files."""

import contextlib
import os
import textwrap
from collections import Counter
from pathlib import Path

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import presets, weight_map
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.dtypes import own_dtype, quantization_modes
from keras_vaultgemma.checkpoints.metadata import model_files
from keras_vaultgemma.checkpoints.reader import format_of
from keras_vaultgemma.data.text_inputs import TURN_END, TURN_START
from keras_vaultgemma.lora import peft_format
from keras_vaultgemma.models.tokenizer import VaultGemmaTokenizer
from keras_vaultgemma.privacy.accounting import SEEDED
from keras_vaultgemma.privacy.ledger import preset_ledger
from keras_vaultgemma.recipes.sources import find_source

FORMATS = {
    weight_map.KERAS: "Keras preset",
    weight_map.HUGGING_FACE: "Hugging Face",
    weight_map.GEMMA: "Hugging Face, as Gemma 1",
    weight_map.KERAS_HUB: "keras-hub GemmaBackbone preset",
}
"""Words for the formats of `weight_map`."""

WIDTH, LABEL = 100, 26
"""Columns of a description, and of the labels in it."""


def describe(preset: str | os.PathLike) -> str:
    """Describe the files, architecture, parameters, tokenizer and privacy of a preset.

    Reads small files only; no weights are downloaded.

    Args:
        preset: string or path. The name of a bundled preset, a folder or a handle (`hf://`,
            `kaggle://`). Also the folder of an adapter that names its base, or one that `finetune`
            wrote.

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
    preset = os.fspath(preset)
    source = find_source(preset)
    try:
        folder = _find(os.fspath(source.preset))
    except (ValueError, OSError, ImportError) as error:
        if source.adapter is None:
            raise
        section = {**_adapter(source), "base is not here": str(error).partition("\n")[0]}
        return "\n".join([preset, "", "Adapter", *_table(section)])
    architecture = read_config(folder)
    count = sum(weight.size for weight in weight_map.weight_map(architecture))
    layers = Counter(architecture["layer_types"]).items()
    metadata_file = folder / presets.METADATA
    metadata = read_json(metadata_file) if metadata_file.is_file() else {}
    sections = {
        **({} if source.adapter is None else {"Adapter": _adapter(source)}),
        "Files": _files(source, folder),
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
        **_private_runs(preset_ledger(folder if source.adapter is None else source.adapter)),
    }
    lines = [preset, *textwrap.wrap(str(metadata.get("description", "")), WIDTH)]
    for title, section in sections.items():
        lines += ["", title, *_table(section)]
    return "\n".join(lines)


def _adapter(source):
    """Return a section about an adapter, from its small files."""
    folder = Path(source.adapter)
    config = read_json(folder / peft_format.CONFIG)
    targets, weights = config.get("target_modules"), folder / peft_format.WEIGHTS
    return {
        "base": source.preset,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": ", ".join(targets) if isinstance(targets, list) else targets,
        "weights": _sizes([weights] if weights.is_file() else []) or "not there",
    }


def _files(source, folder):
    """Return a section about the files of a preset: kind, format, dtype and size."""
    preset, missing = os.fspath(source.preset), f"not in {folder}"
    if preset in presets.HUBS:  # bundled without weights
        home = presets.cache_home()
        missing = f"not in {home}; downloaded from {' or '.join(presets.HUBS[preset])}"
        downloaded = (path for path in (home / preset, home) if presets.file(path, "weights"))
        folder = next(downloaded, folder)
    weights = [path for path in model_files(folder) if path.suffix in (".h5", ".safetensors")]
    dtype, modes = own_dtype(folder), quantization_modes(folder)
    return {
        "kind": "preset" if source.adapter is None else "base of the adapter",
        "format": FORMATS[format_of(folder)],
        "dtype": dtype or " and ".join([*modes, "float"] if modes else ["not stated"]),
        "weights": _sizes(weights) or missing,
        "all files": _sizes(model_files(folder)),
    }


def _sizes(paths):
    """Return the number and the total size of files in words, or "" for none."""
    if not paths:
        return ""
    name = paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    size = sum(path.stat().st_size for path in paths)
    return f"{name}, {size / 1e6:,.1f} MB" if size >= 1e6 else f"{name}, {size / 1e3:,.0f} kB"


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
