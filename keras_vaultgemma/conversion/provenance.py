"""Where a converted model comes from and what was promised about it: the content of its metadata.json."""

import datetime
import hashlib
import os
from pathlib import Path

import keras
import keras_hub

import keras_vaultgemma
from keras_vaultgemma import presets
from keras_vaultgemma.stored_tensor import dtype_name

PIECE = 2**20
"""Bytes that are hashed at a time."""

STATED = ("license", "sources", "privacy")


def model_files(folder):
    """Paths, in a fixed order, of the files in a folder that belong to a model in any of the formats."""
    patterns = [*presets.DOWNLOADS["weights"], "assets/*/*.spm", "README.md"]
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()})


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


def metadata(source, folder, source_digests, parameter_count, dtype):
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
    stated = presets.read_json(path) if path.is_file() else {}
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
        "keras_vaultgemma_version": keras_vaultgemma.__version__,
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
