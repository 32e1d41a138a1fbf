"""Where a converted model comes from and what was promised about it: the content of its metadata.json."""

import datetime
import hashlib
import os
from pathlib import Path

import keras
import keras_hub

from keras_vaultgemma._files import read_json
from keras_vaultgemma._version import __version__
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.lazy_tensor import dtype_name

PIECE = 2**20
"""Bytes that are hashed at a time."""

STATED = ("license", "sources", "privacy")


def model_files(folder):
    """Paths, in a fixed order, of the files in a folder that belong to a model in any of the formats."""
    patterns = [*presets.DOWNLOADS["weights"], "assets/*/*.spm", "README.md"]
    return sorted(
        {path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}
    )


def digests(folder, report=lambda name, count: None):
    """{path inside the folder: SHA-256} of a model's files, metadata.json left out.

    Args:
        report: called with a file's name and the bytes that were read.
    """
    folder = Path(folder)
    files = (path for path in model_files(folder) if path != folder / presets.METADATA)
    return {path.relative_to(folder).as_posix(): sha256(path, report) for path in files}


def sha256(path, report=lambda name, count: None):
    """Hexadecimal SHA-256 of a file, read piece by piece."""
    digest, buffer = hashlib.sha256(), bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            report(path.name, count)
    return digest.hexdigest()


def new_metadata(source, folder, source_digests, parameter_count, dtype):
    """What metadata.json says, but for the digests of the new files.

    What the source states of itself is handed on: licence, privacy and whatever else its own metadata.json holds. A
    source that has none, and is Google's release by its name and its number of parameters, is given what this package's
    bundled vaultgemma_1b preset states. No other source is given a privacy statement that it does not make.

    Args:
        source: the name, handle or folder as the user gave it. Of a folder only the last part is noted.
        folder: where it was found.
        source_digests: as `digests` returns them.
        parameter_count: of the model.
        dtype: NumPy dtype of the new files.
    """
    path = folder / presets.METADATA
    stated = read_json(path) if path.is_file() else {}
    if not stated:
        release = presets.release_metadata(source, parameter_count)
        stated = {key: release[key] for key in STATED if key in release}
    name = os.fspath(source)
    earlier = stated.pop("source", None)
    stated.pop("files", None)
    return {
        **stated,
        "keras_version": keras.__version__,
        "keras_hub_version": keras_hub.__version__,
        "keras_vaultgemma_version": __version__,
        "parameter_count": parameter_count,
        "dtype": dtype_name(dtype),
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM"],
        "source": {
            "name": folder.resolve().name if Path(name).is_dir() else name,
            "revision": _revision(name, folder),
            "files": source_digests,
            **({"source": earlier} if earlier else {}),
        },
    }


def _revision(name, folder):
    """The commit or version in a hub's cache, by where the folder stands in it; None elsewhere."""
    if folder.parent.name == "snapshots":
        return folder.name
    return folder.name if folder.name.isdigit() and not Path(name).is_dir() else None


# MERGED: """README.md of a converted model, written from its metadata."""
LABELS = {
    "epsilon": "ε",
    "delta": "δ",
    "unit": "unit of protection",
    "mechanism": "mechanism",
    "noise_multiplier": "noise multiplier",
    "accounting": "accounting",
    "covers": "what it covers",
    "source": "source",
}
"""Keys of a privacy statement, in words."""

USE = {
    "keras": """```python
from keras_vaultgemma import VaultGemmaCausalLM

model = VaultGemmaCausalLM.from_preset("path/to/this/folder"{without_text})
```""",
    "hf": """```python
from transformers import AutoModelForCausalLM{and_tokenizer}

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"){load_tokenizer}
```""",
}


def model_card(to, metadata, hyperparameters, has_vocabulary, training=()):
    """Text of a model card.

    Args:
        to: "keras" or "hf", the format of the folder.
        metadata: as metadata.json holds it.
        hyperparameters: of the backbone, as `checkpoint.open_values` returns them.
        has_vocabulary: whether the folder has one.
        training: what the ledger says of training since, a sentence each.
    """
    source = metadata["source"]
    revision = f", revision `{source['revision']}`" if source["revision"] else ""
    use = USE[to].format(
        without_text="" if has_vocabulary else ", preprocessor=None",
        and_tokenizer=", AutoTokenizer" if has_vocabulary else "",
        load_tokenizer='\ntokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
        if has_vocabulary
        else "",
    )
    layers = {
        name: hyperparameters["layer_types"].count(name)
        for name in sorted(set(hyperparameters["layer_types"]))
    }
    shown = {
        **hyperparameters,
        "layer_types": ", ".join(f"{count} x {name}" for name, count in layers.items()),
    }
    return "\n".join(
        [
            "---",
            f"library_name: {'keras-hub' if to == 'keras' else 'transformers'}",
            "pipeline_tag: text-generation",
            "tags: [vaultgemma, differential-privacy]",
            "---",
            "",
            "# VaultGemma",
            "",
            str(metadata.get("description") or "A decoder of the Gemma family."),
            "",
            use,
            "",
            "## Source",
            "",
            f"Converted from `{source['name']}`{revision} by keras_vaultgemma {metadata['keras_vaultgemma_version']}, "
            f"stored in {metadata['dtype']}. `metadata.json` has the SHA-256 of every file of the source and of this "
            "folder.",
            "",
            "## Architecture",
            "",
            f"- parameters: {metadata['parameter_count']:,}",
            *[f"- {name}: {value}" for name, value in shown.items()],
            "",
            "## Privacy",
            "",
            *_privacy(metadata),
            *[f"- {sentence}" for sentence in training],
            "",
            "## Licence",
            "",
            f"{metadata.get('license') or 'The source states no licence; its terms apply to this copy too'}.",
            "",
        ]
    )


def _privacy(metadata):
    if "privacy" not in metadata:
        return ["The source makes no statement about privacy."]
    if not metadata["privacy"]:
        return ["The source states that it was not trained with differential privacy."]
    statement = metadata["privacy"]
    if not isinstance(statement, dict):
        return [str(statement)]
    return [f"- {LABELS.get(key, key)}: {value}" for key, value in statement.items()]
