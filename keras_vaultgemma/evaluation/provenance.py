"""Hashes of what an evaluation depends on: models, data and code.

**Data have keyed fingerprints.** With a plain hash of the records, somebody who knows all records
but one could try candidates for that one until the hash matches. The key stays on this machine
(`privacy.fingerprint`), whose user can check a fingerprint and nobody else can.
"""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma._files import ignore_progress
from keras_vaultgemma._version import __version__
from keras_vaultgemma.checkpoints import metadata, presets
from keras_vaultgemma.data.text_inputs import as_records
from keras_vaultgemma.privacy import fingerprint

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", presets.LEDGER)


def describe_model(preset, adapter=None, report=ignore_progress):
    """Return the name of a model and the SHA-256 of each of its files.

    Args:
        preset: string or path of a preset. Of a folder only the last part is recorded.
        adapter: path of the folder of an adapter, or None.
        report: callable. Called with the number of bytes of each chunk after it is read.

    Returns:
        Dict of `preset`, `adapter`, `files` (a dict of paths to digests) and `sha256`, the digest
        of all of these.
    """
    folder = presets.find(preset, "weights")
    files = metadata.digests(folder, report)
    if adapter is not None:
        paths = (Path(adapter) / name for name in ADAPTER_FILES)
        files |= {
            f"adapter/{path.name}": metadata.sha256(path, report)
            for path in paths
            if path.is_file()
        }
    return {
        "preset": _last_part(preset),
        "adapter": None if adapter is None else "/".join(Path(adapter).absolute().parts[-2:]),
        "files": files,
        "sha256": _digest_of(files),
    }


def describe_data(records, measured, canaries=()):
    """Return how many records there are and were measured, and their keyed fingerprint.

    Args:
        records: `TextRecords`.
        measured: int. Number of them that were measured.
        canaries: list of strings that were trained on with the records, and that the fingerprint
            includes. Defaults to none.
    """
    contents = as_records(records.samples) + (as_records(list(canaries)) if canaries else [])
    return {
        "records": len(records.texts),
        "canaries": len(canaries),
        "measured": measured,
        "fingerprint": fingerprint.fingerprint(contents, fingerprint.key()),
    }


def describe_code():
    """Return the version and the SHA-256 of this package's source files, and other versions."""
    root = Path(__file__).parents[1]
    suffixes = (".py", ".html", ".css", ".json")
    files = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.suffix in suffixes and "bundled_presets" not in path.parts
    }
    return {
        "keras_vaultgemma": __version__,
        "sha256": _digest_of(files),
        "keras": keras.__version__,
        "backend": f"{backend.NAME} {_version(backend.NAME)}",
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _last_part(preset):
    preset = os.fspath(preset)
    return Path(preset).resolve().name if Path(preset).is_dir() else preset


def _digest_of(files):
    """Return the SHA-256 of the lines "digest  path" of files, as `sha256sum` prints them."""
    lines = (f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # such as tensorflow-cpu
        return "of unknown version"
