"""The metadata.json of a converted model: its source, its files and what is stated about it."""

import datetime
import hashlib
import os
from pathlib import Path

import keras
import keras_hub

from keras_vaultgemma._files import ignore_progress, is_legal_link, read_json
from keras_vaultgemma._version import __version__
from keras_vaultgemma.checkpoints import presets

HASH_CHUNK = 2**20
"""Bytes that are hashed at a time."""

STATEMENTS = ("license", "sources", "privacy")
"""Keys of Google's metadata that are copied to a conversion of its release."""


GRAPH_FILES = (
    "model.onnx",
    "model.onnx.data",
    "model.xml",
    "model.bin",
    "saved_model.pb",
    "fingerprint.pb",
    "variables/variables.*",
)
"""Files of ONNX, OpenVINO and TensorFlow."""


def model_files(folder, as_names=False):
    """Return the model files of a folder, of any of the formats.

    Args:
        folder: `pathlib.Path` or string.
        as_names: bool. If True, return a set of paths relative to the folder, with "/". Defaults to
            False, for a sorted list of `pathlib.Path`.
    """
    patterns = [
        *presets.DOWNLOADS["weights"],
        "assets/*/*.spm",
        "additional_chat_templates/*.jinja",
        "*.gguf",
        "onnx/*.onnx",
        "onnx/*.onnx_data*",
        *GRAPH_FILES,
        "Modelfile",
        "README.md",
    ]
    folder = Path(folder)
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if as_names:
        return {path.relative_to(folder).as_posix() for path in paths}
    return sorted(paths)


def digests(folder, report=ignore_progress):
    """Return the SHA-256 digests of a model's files, except metadata.json.

    Links that leave the folder are left out, because a digest tells something about their target.

    Args:
        folder: `pathlib.Path` or string.
        report: callable. Called with the number of bytes of each chunk after it is read.

    Returns:
        Dict of paths relative to the folder to hexadecimal digests.
    """
    folder = Path(folder)
    files = [path for path in model_files(folder) if path != folder / presets.METADATA]
    files = [path for path in files if is_legal_link(path, folder)]
    return {path.relative_to(folder).as_posix(): sha256(path, report) for path in files}


def sha256(path, report=ignore_progress):
    """Return the hexadecimal SHA-256 of a file, which is read in chunks."""
    digest, buffer = hashlib.sha256(), bytearray(HASH_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            report(count)
    return digest.hexdigest()


def new_metadata(source, folder, source_digests, parameter_count, dtype):
    """Return the content of metadata.json, without the digests of the new files.

    The metadata.json of the source is copied: its licence, its privacy statement and every other
    key. If the source has none and is Google's release, by its name and its number of parameters,
    the statements of the bundled vaultgemma_1b preset are used. No other source gets a privacy
    statement that it does not make.

    Args:
        source: string or path. The name, handle or folder that the user gave. Only the last part of
            a folder is recorded.
        folder: `pathlib.Path` of the source's files.
        source_digests: dict of paths to digests, as `digests` returns it.
        parameter_count: int. Number of parameters of the model.
        dtype: string. Dtype of the new files.

    Returns:
        Dict that is serialisable as JSON.
    """
    path = folder / presets.METADATA
    statements = read_json(path) if path.is_file() else {}
    if not statements:
        release = presets.release_metadata(source, parameter_count)
        statements = {key: release[key] for key in STATEMENTS if key in release}
    name = os.fspath(source)
    earlier = statements.pop("source", None)
    statements.pop("files", None)
    return {
        **statements,
        "keras_version": keras.__version__,
        "keras_hub_version": keras_hub.__version__,
        "keras_vaultgemma_version": __version__,
        "parameter_count": parameter_count,
        "dtype": dtype,
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
    """Return the commit or version that a folder in a hub's cache is named after, or None."""
    if folder.parent.name == "snapshots":
        return folder.name
    return folder.name if folder.name.isdigit() and not Path(name).is_dir() else None
