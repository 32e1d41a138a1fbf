"""A preset's name or handle to a folder on this machine. Knows files, not classes."""

import os
import re
from pathlib import Path

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import hubs

CONFIG = "config.json"
METADATA = "metadata.json"
LEDGER = "privacy_ledger.jsonl"
FILES = {
    "config": (CONFIG,),
    "vocabulary": ("tokenizer.model", "assets/tokenizer/vocabulary.spm"),
    "weights": (
        "model.weights.h5",
        "model.weights.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ),
}
"""What a caller may need of a preset, and the files of which one must be there, in Hugging Face's or Keras's layout."""

DOWNLOADS = {
    "config": [CONFIG, METADATA, LEDGER],
    "vocabulary": ["*.json", "*.model", "*.spm", LEDGER],
    "weights": ["*.json", "*.model", "*.spm", "*.safetensors", "*.h5", LEDGER],
}
"""The same as patterns for a download; the rest of a repository is other formats of the same weights."""

HUBS = {
    "vaultgemma_1b": (
        "hf://google/vaultgemma-1b",
        "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2",
    )
}
"""Bundled presets whose weights are not bundled, and where they are."""

RELEASE = "vaultgemma_1b"
"""The bundled preset whose metadata holds what Google states of its release."""


def bundled():
    """Folder of each bundled preset by name."""
    package = Path(__file__).parents[1]
    # Inside a wheel the presets stand in the package, in a checkout beside it.
    root = next(
        (p for p in (package / "bundled_presets", package.parent / "presets") if p.is_dir()), None
    )
    return (
        {path.name: path for path in sorted(root.iterdir()) if (path / CONFIG).exists()}
        if root
        else {}
    )


def release_metadata(preset, parameter_count):
    """What the bundled metadata states of Google's release, for a preset that is it; {} for any other.

    Args:
        preset: a name or handle, of any revision.
        parameter_count: of the model that was found there.
    """
    name = re.sub(r"@.*|/\d+$", "", os.fspath(preset))
    if name != RELEASE and name not in (re.sub(r"/\d+$", "", handle) for handle in HUBS[RELEASE]):
        return {}
    release = read_json(bundled()[RELEASE] / METADATA)
    return release if release["parameter_count"] == parameter_count else {}


def cache_home():
    """Where weights that a user fetched are looked for: `KERAS_VAULTGEMMA_HOME` or a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("KERAS_VAULTGEMMA_HOME") or f"{cache}/keras_vaultgemma").expanduser()


def find(preset, need="weights"):
    """The folder of a preset, downloaded where it has to be.

    Args:
        preset: a bundled preset's name, a local folder, `hf://org/name[@revision]` or
            `kaggle://org/model/framework/variation[/version]`.
        need: "config", "vocabulary" or "weights": what the caller will read, so that no more is downloaded.

    Returns:
        `pathlib.Path` of a folder that has a config.json and what is needed.

    Raises:
        ValueError: for a preset that is none of these, a repository or revision that does not exist, or a folder
            without config.json.
        FileNotFoundError: where the folder has not what is needed, or it cannot be fetched: the model is gated, the hub
            cannot be reached, the download broke off, or something else arrived than was announced.
    """
    name = os.fspath(preset) if isinstance(preset, (str, os.PathLike)) else ""
    folders = bundled()
    if name in folders:
        folder = folders[name]
        if name in HUBS and not file(folder, need):
            return _fetch(name, need)
    elif name.startswith("hf://"):
        folder = hubs.from_hugging_face(name, DOWNLOADS[need])
    elif name.startswith("kaggle://"):
        folder = hubs.from_kaggle(name)
    elif name and os.path.isdir(name):
        folder = Path(name)
    else:
        raise ValueError(
            f"`preset` must be a bundled preset ({', '.join(folders)}), a folder, hf://org/name[@revision] or "
            f"kaggle://org/model/framework/variation[/version]. Received: {preset!r}"
        )
    if not file(folder, "config"):
        raise ValueError(
            f"{preset} has no {CONFIG}, so it is neither a preset nor a Hugging Face checkpoint"
        )
    if not file(folder, need):
        raise FileNotFoundError(
            f"{preset} has no {need}: none of {', '.join(FILES[need])} is there"
        )
    return folder


def file(folder, need):
    """Path of the folder's "config", "vocabulary" or "weights" (a single file or the index of several), or None."""
    return next(
        (Path(folder) / name for name in FILES[need] if (Path(folder) / name).is_file()), None
    )


def is_keras(folder):
    """Whether a folder is a Keras preset of this package (and not a Hugging Face or other checkpoint)."""
    return str(read_json(Path(folder) / CONFIG).get("registered_name")).startswith(
        "keras_vaultgemma>"
    )


def _fetch(name, need):
    """What a bundled preset needs from elsewhere: from the user's cache, else from each hub in turn."""
    home = cache_home()
    for folder in (home / name, home):
        if file(folder, "config") and file(folder, need):
            return folder
    tried = [f"{home / name} " + (f"has no {need}" if (home / name).is_dir() else "does not exist")]
    for handle in HUBS[name]:
        try:
            return find(handle, need)
        except (ValueError, OSError, ImportError) as error:
            tried.append(str(error))
    hugging_face, kaggle = HUBS[name]
    repository = hugging_face.removeprefix("hf://")
    model = "/".join(kaggle.removeprefix("kaggle://").split("/")[:2])
    raise FileNotFoundError(
        f"The {need} of {name} must be fetched once, for the model is gated. Three ways:\n"
        f"1. Hugging Face: accept the terms at https://huggingface.co/{repository}, then\n"
        "       hf auth login\n"
        f"2. Kaggle: accept the terms at https://www.kaggle.com/models/{model}, make an API token in your settings "
        "there, then\n"
        "       export KAGGLE_API_TOKEN=<the token>\n"
        "3. A folder, for a machine without network: on another one, after `hf auth login`,\n"
        f"       hf download {repository} --local-dir {name}\n"
        f"   and copy that folder to {home / name} (or name another folder in KERAS_VAULTGEMMA_HOME).\n"
        "Then try again. What was tried:\n" + "\n".join(f"- {line}" for line in tried)
    )
