"""A preset's name or handle to a folder on this machine. Knows files, not classes."""

import json
import os
from pathlib import Path

CONFIG = "config.json"
METADATA = "metadata.json"
FILES = {
    "config": (CONFIG,),
    "vocabulary": ("tokenizer.model", "assets/tokenizer/vocabulary.spm"),
    "weights": ("model.weights.h5", "model.weights.json", "model.safetensors", "model.safetensors.index.json"),
}
"""What a caller may need of a preset, and the files of which one must be there, in Hugging Face's or Keras's layout."""

HUBS = {"vaultgemma_1b": ("hf://google/vaultgemma-1b", "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2")}
"""Bundled presets whose weights are not bundled, and where they are."""


def bundled():
    """Folder of each bundled preset by name."""
    package = Path(__file__).parent
    # Inside a wheel the presets stand in the package, in a checkout beside it.
    root = next((p for p in (package / "bundled_presets", package.parent / "presets") if p.is_dir()), None)
    return {path.name: path for path in sorted(root.iterdir()) if (path / CONFIG).exists()} if root else {}


def cache_home():
    """Where weights that a user fetched are looked for: `KERAS_VAULTGEMMA_HOME` or a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("KERAS_VAULTGEMMA_HOME") or f"{cache}/keras_vaultgemma").expanduser()


def find(preset, need="weights"):
    """The folder of a preset, downloaded where it has to be.

    Args:
        preset: a bundled preset's name, a local folder, `hf://org/name[@revision]` or
            `kaggle://org/model/keras/variation[/version]`.
        need: "config", "vocabulary" or "weights": what the caller will read, so that no more is downloaded.

    Returns:
        `pathlib.Path` of a folder that has a config.json.

    Raises:
        ValueError: for a preset that is none of these, or a folder without config.json.
        FileNotFoundError: where the folder has no such file and none can be fetched.
    """
    preset = os.fspath(preset)
    if preset in bundled():
        folder = bundled()[preset]
        return folder if file(folder, need) else _fetch(preset, need)
    if preset.startswith("hf://"):
        folder = _from_hugging_face(preset, need)
    elif preset.startswith("kaggle://"):
        folder = _from_kaggle(preset)
    elif Path(preset).is_dir():
        folder = Path(preset)
    else:
        raise ValueError(
            f"`preset` must be a bundled preset ({', '.join(bundled())}), a folder, hf://org/name or "
            f"kaggle://org/model/keras/variation. Received: {preset!r}"
        )
    if not file(folder, "config"):
        raise ValueError(f"{preset} has no {CONFIG}, so it is neither a preset nor a Hugging Face checkpoint")
    if not file(folder, need):
        raise FileNotFoundError(f"{preset} has no {need}: none of {', '.join(FILES[need])} is there")
    return folder


def file(folder, need):
    """Path of the folder's "config", "vocabulary" or "weights" (a single file or the index of several), or None."""
    return next((Path(folder) / name for name in FILES[need] if (Path(folder) / name).is_file()), None)


def is_keras(folder):
    """Whether a folder is a Keras preset of this package (and not a Hugging Face or other checkpoint)."""
    return read_json(Path(folder) / CONFIG).get("registered_name", "").startswith("keras_vaultgemma>")


def read_json(path):
    """A JSON object from a file.

    Raises:
        ValueError: names the file where it is not one.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object. Received: {type(content).__name__}")
    return content


def _fetch(name, need):
    """What a bundled preset needs from elsewhere: from the user's cache, else from each hub in turn."""
    home = cache_home()
    for folder in (home / name, home):
        if file(folder, "config") and file(folder, need):
            return folder
    reasons = []
    for handle in HUBS[name]:
        try:
            return find(handle, need)
        except (ValueError, OSError, ImportError) as error:
            reasons.append(f"{handle}: {str(error).strip().splitlines()[0]}")
    repository = HUBS[name][0].removeprefix("hf://")
    raise FileNotFoundError(
        f"The {need} of {name}: not on this machine, and neither hub gave it. The model is gated: accept its terms "
        "once at the hub, then use one of three ways.\n"
        f"1. Hugging Face: open https://huggingface.co/{repository} and accept; `hf auth login`; try again.\n"
        f"2. Kaggle: open https://www.kaggle.com/models/keras/vaultgemma and accept; `pip install kagglehub`; put your "
        "API token into ~/.kaggle/kaggle.json; try again.\n"
        f"3. A folder: `hf download {repository} --local-dir {home / name}` on a machine that can, copy the folder "
        "to this one, and name its parent in KERAS_VAULTGEMMA_HOME.\n"
        + "\n".join(f"Tried {reason}" for reason in reasons)
    )


def _from_hugging_face(preset, need):
    import huggingface_hub
    from huggingface_hub import errors

    # The rest of a repository is other formats of the same weights.
    patterns = ["*.json", "*.model", "*.spm", "README.md"]
    patterns += ["*.safetensors", "*.h5"] if need == "weights" else []
    name, _, revision = preset.removeprefix("hf://").partition("@")
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except errors.GatedRepoError as error:
        raise ValueError(f"{preset} is gated: accept its terms on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"{preset} does not exist, or is private and needs `hf auth login`") from error
    except (errors.HFValidationError, errors.RevisionNotFoundError) as error:
        raise ValueError(f"{preset} is not a repository on Hugging Face: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{preset} is not in the local cache and the hub cannot be reached") from error
    return Path(folder)


def _from_kaggle(preset):
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError("Kaggle handles need `pip install kagglehub`") from error
    try:
        return Path(kagglehub.model_download(preset.removeprefix("kaggle://")))
    except Exception as error:  # kagglehub raises whatever its HTTP library does
        raise FileNotFoundError(f"{preset} could not be downloaded: {error}") from error
