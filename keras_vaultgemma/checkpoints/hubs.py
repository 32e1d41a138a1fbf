"""Handles of Hugging Face and Kaggle to folders: downloads, and one clear message for each way in which they fail."""

import hashlib
import re
import time
from pathlib import Path

PATIENCE = 10
"""Seconds that Hugging Face has to answer a first question."""


def from_hugging_face(preset, patterns):
    """The folder of a Hugging Face repository, in its cache.

    Args:
        preset: `hf://org/name[@revision]`.
        patterns: of the names of files that are needed.

    Raises:
        ValueError: for a repository or revision that does not exist.
        FileNotFoundError: where files cannot be fetched, or are others than the hub announced.
    """
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = preset.removeprefix("hf://").partition("@")
    revision = revision or None
    obstacle, start = None, time.time()
    try:
        # One question with a time limit. `snapshot_download` has none: it waits for minutes behind a firewall.
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=PATIENCE)
    except Exception as error:  # whatever it is, a copy in the local cache will do
        obstacle = error
    try:
        offline = obstacle is not None
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=offline
        )
    except Exception as error:  # also those of the HTTP library, which differs between versions
        cause = obstacle or error
        if isinstance(cause, errors.HFValidationError):
            raise ValueError(
                f"`preset` must be hf://org/name[@revision]. Received: {preset!r}"
            ) from cause
        if isinstance(cause, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
            page = f"https://huggingface.co/{name}"
            raise FileNotFoundError(
                f"{preset} is gated: accept its terms at {page}, then `hf auth login`"
            ) from cause
        if isinstance(cause, errors.RepositoryNotFoundError):
            raise ValueError(
                f"{preset} does not exist, or is private and needs `hf auth login`"
            ) from cause
        if isinstance(cause, errors.RevisionNotFoundError):
            raise ValueError(f"{preset} has no revision {revision!r}") from cause
        problem = (
            "is not in the local cache, and the hub cannot be asked"
            if offline
            else "could not be downloaded"
        )
        raise FileNotFoundError(f"{preset} {problem}: {_one_line(cause)}") from cause
    for path in Path(folder).rglob("*"):
        if path.is_file():
            _check_content(path, start, preset)
    return Path(folder)


def from_kaggle(preset):
    """The folder of a Kaggle model, in its cache.

    Args:
        preset: `kaggle://org/model/framework/variation[/version]`.

    Raises:
        ValueError: for a model that does not exist.
        ImportError: where kagglehub is not installed.
        FileNotFoundError: where it cannot be fetched.
    """
    if not re.fullmatch(r"kaggle://([^/]+/){3}[^/]+(/\d+)?", preset):
        raise ValueError(
            f"`preset` must be kaggle://org/model/framework/variation[/version]. Received: {preset!r}"
        )
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError(f"{preset} needs `pip install kagglehub`") from error
    try:
        return Path(kagglehub.model_download(preset.removeprefix("kaggle://")))
    except Exception as error:  # its own, and whatever its HTTP library raises
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            hint = "accept its terms on its page at www.kaggle.com, and set KAGGLE_API_TOKEN"
            raise FileNotFoundError(f"{preset} is gated or private: {hint}") from error
        if status == 404:
            raise ValueError(f"{preset} does not exist, or is private") from error
        raise FileNotFoundError(f"{preset} could not be downloaded: {_one_line(error)}") from error


def _check_content(path, start, preset):
    """Remove a file that has been downloaded since `start` and is not what the hub announced.

    The cache keeps a file under its ETag, which for large files is the SHA-256 of what they hold. huggingface_hub looks
    at the size alone.
    """
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.stat().st_ctime < start:
        return
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink()
        raise FileNotFoundError(
            f"{preset} could not be downloaded: {path.name} must have the SHA-256 {blob.name}. Received: {found}"
        )


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())
