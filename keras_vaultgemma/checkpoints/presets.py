"""From the name or handle of a preset to a folder on this machine. Knows files, not classes."""

import os
from pathlib import Path

from keras_vaultgemma._files import check_link, read_json
from keras_vaultgemma.checkpoints import foreign_files, hubs, names

CONFIG = "config.json"
METADATA = "metadata.json"
LEDGER = "privacy_ledger.jsonl"
FILES = {
    "config": (CONFIG,),
    "vocabulary": ("tokenizer.model", "assets/tokenizer/vocabulary.spm", "tokenizer.json"),
    "weights": (
        "model.weights.h5",
        "model.weights.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ),
}
"""Parts of a preset, and for each the files of which at least one must exist."""

DOWNLOADS = {
    "config": [CONFIG, METADATA, LEDGER],
    "vocabulary": ["*.json", "*.jinja", "*.model", "*.spm", LEDGER],
    "weights": ["*.json", "*.jinja", "*.model", "*.spm", "*.safetensors", "*.h5", LEDGER],
}
"""The same parts as patterns of files to download.

Other files of a repository hold the same weights in other formats."""

HUBS = {
    "vaultgemma_1b": (
        "hf://google/vaultgemma-1b",
        "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2",
    )
}
"""Handles of the weights of bundled presets that are bundled without them."""


def bundled():
    """Return a dict of the bundled presets' names to their folders."""
    package = Path(__file__).parents[1]
    # A wheel has the presets inside the package, a source checkout next to it.
    for root in (package / "bundled_presets", package.parent / "presets"):
        if root.is_dir():
            return {path.name: path for path in sorted(root.iterdir()) if (path / CONFIG).exists()}
    return {}


def release_metadata(preset, parameter_count):
    """Return Google's statements about its release if a preset is that release.

    Args:
        preset: string or path. A name or handle, with or without a revision.
        parameter_count: int. Number of parameters of the model that was found there.

    Returns:
        Dict, the content of the bundled metadata.json. Empty for any other preset.
    """
    if not names.is_release(os.fspath(preset)):
        return {}
    release = read_json(bundled()[names.RELEASE] / METADATA)
    return release if release["parameter_count"] == parameter_count else {}


def hugging_face_name(preset):
    """Return `(name, revision)` by which other packages know a preset's weights.

    Args:
        preset: string, as for `find`, or None.

    Returns:
        The name of a repository of Hugging Face and its revision or None where the preset is one;
        otherwise the preset as it was given, and None.
    """
    if preset is None:
        return None, None
    handle = HUBS[preset][0] if preset in HUBS else preset
    if not handle.startswith("hf://"):
        return handle, None
    name, _, revision = handle.removeprefix("hf://").partition("@")
    return name, revision or None


def cache_home():
    """Return the folder in which downloaded weights are looked up.

    `KERAS_VAULTGEMMA_HOME` if it is set, else `keras_vaultgemma` in the user's cache folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("KERAS_VAULTGEMMA_HOME") or f"{cache}/keras_vaultgemma").expanduser()


def find(preset, need="weights"):
    """Return the folder of a preset, and download its files if necessary.

    Args:
        preset: string or path. A bundled preset's name, a local folder, `hf://org/name[@revision]`
            or `kaggle://org/model/framework/variation[/version]`, or what `names.canonical` knows
            as one of these.
        need: string. The part that the caller will read, so that no more is downloaded: "config",
            "vocabulary" or "weights". Defaults to "weights".

    Returns:
        `pathlib.Path` of a folder that has a config.json and the files of `need`.

    Raises:
        ValueError: If `preset` is none of these, the repository or revision does not exist, or the
            folder has no config.json.
        FileNotFoundError: If the folder lacks the files of `need`, or they cannot be downloaded:
            the model is gated, the hub is unreachable, the download was interrupted, or its content
            is not what the hub announced.
        ImportError: If a `kaggle://` handle is given and kagglehub is not installed.
    """
    name = names.canonical(preset) if isinstance(preset, (str, os.PathLike)) else ""
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
            f"`preset` must be a bundled preset ({', '.join(folders)}), a folder, "
            "hf://org/name[@revision] or kaggle://org/model/framework/variation[/version]. "
            f"{names.suggest(name, folders)}Received: preset={preset!r}"
        )
    if not file(folder, "config"):
        raise ValueError(
            f"{preset} has no {CONFIG}, so it is neither a preset nor a Hugging Face checkpoint"
            f"{foreign_files.explain(_file_names(name, folder))}"
        )
    if not file(folder, need):
        found = foreign_files.explain(_file_names(name, folder)) if need == "weights" else ""
        raise FileNotFoundError(
            f"{preset} has no {need}: none of {', '.join(FILES[need])} exists{found}"
        )
    return folder


def file(folder, need):
    """Return the path of the first existing file of `need`, or None.

    Args:
        folder: `pathlib.Path` or string.
        need: string. "config", "vocabulary" or "weights" (a single file or the index of several).
    """
    for name in FILES[need]:
        path = Path(folder) / name
        # In a Keras preset, tokenizer.json is the config of the tokenizer's class.
        if path.is_file() and (name != "tokenizer.json" or not names_a_class(folder)):
            return path
    return None


def check_links(folder):
    """Raise ValueError if a file that keras-hub may read is a link that leaves its folder."""
    folder = Path(folder)
    for path in (*folder.glob("*.json"), *folder.glob("*.h5"), *folder.glob("assets/**/*")):
        check_link(path, folder)


def names_a_class(folder):
    """Return True if the config of a folder names a class, as Keras's formats do."""
    path = Path(folder) / CONFIG
    return path.is_file() and "registered_name" in read_json(path)


def is_keras(folder):
    """Return True if a folder is a Keras preset of this package."""
    registered_name = str(read_json(Path(folder) / CONFIG).get("registered_name"))
    return registered_name.startswith("keras_vaultgemma>")


def _file_names(name, folder):
    """Return the names of all files of a folder, or of the repository that it was loaded from."""
    if name.startswith("hf://"):
        return hubs.file_names(name)
    return [path.name for path in folder.iterdir() if path.is_file()]


def _fetch(name, need):
    """Return a folder with the files that are not bundled: from the cache, else from the hubs."""
    home = cache_home()
    for folder in (home / name, home):
        if file(folder, "config") and file(folder, need):
            return folder
    state = f"has no {need}" if (home / name).is_dir() else "does not exist"
    attempts = [f"{home / name} {state}"]
    for handle in HUBS[name]:
        try:
            return find(handle, need)
        except (ValueError, OSError, ImportError) as error:
            attempts.append(str(error))
    hugging_face, kaggle = HUBS[name]
    repository = hugging_face.removeprefix("hf://")
    model = "/".join(kaggle.removeprefix("kaggle://").split("/")[:2])
    raise FileNotFoundError(
        f"The {need} of {name} must be downloaded once, because the model is gated. Three ways:\n"
        f"1. Hugging Face: accept the terms at https://huggingface.co/{repository}, then\n"
        "       hf auth login\n"
        f"2. Kaggle: accept the terms at https://www.kaggle.com/models/{model}, "
        "create an API token in your settings there, then\n"
        "       export KAGGLE_API_TOKEN=<the token>\n"
        "3. A folder, for a machine without network: on another machine, after `hf auth login`,\n"
        f"       hf download {repository} --local-dir {name}\n"
        f"   and copy that folder to {home / name} "
        "(or set KERAS_VAULTGEMMA_HOME to another folder).\n"
        "Then try again. Attempts so far:\n" + "\n".join(f"- {line}" for line in attempts)
    )
