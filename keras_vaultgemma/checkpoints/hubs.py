"""Downloads from Hugging Face and Kaggle, with one clear error for each way in which they fail."""

import hashlib
import re
import time
from pathlib import Path

from keras_vaultgemma.checkpoints import names

TIMEOUT = 10
"""Seconds in which Hugging Face must answer the first request."""


def from_hugging_face(preset, patterns):
    """Download files of a Hugging Face repository into its cache.

    Without network, the files of an earlier download are used.

    Args:
        preset: string. `hf://org/name[@revision]`.
        patterns: list of strings. Glob patterns of the files to download.

    Returns:
        `pathlib.Path` of the folder of that revision in the cache.

    Raises:
        ValueError: If the repository or revision does not exist, or the handle is malformed.
        FileNotFoundError: If the repository is gated, files cannot be downloaded, or their content
            is not what the hub announced.
    """
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = preset.removeprefix("hf://").partition("@")
    revision = revision or None
    hub_error, start = None, time.time()
    try:
        # One request with a timeout, because `snapshot_download` has none and hangs for minutes
        # behind a firewall.
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
    except Exception as error:  # Whatever it is, a copy in the local cache is enough.
        hub_error = error
    try:
        offline = hub_error is not None
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=offline
        )
    except Exception as error:  # Includes errors of the HTTP library, which varies.
        cause = hub_error or error
        if isinstance(cause, errors.HFValidationError):
            raise ValueError(
                f"`preset` must be hf://org/name[@revision]. Received: preset={preset!r}"
            ) from cause
        if isinstance(cause, errors.GatedRepoError):  # A subclass of RepositoryNotFoundError.
            page = f"https://huggingface.co/{name}"
            raise FileNotFoundError(
                f"{preset} is gated: accept its terms at {page}, then `hf auth login`"
            ) from cause
        if isinstance(cause, errors.RepositoryNotFoundError):
            raise ValueError(
                f"{preset} does not exist, or is private and needs `hf auth login`"
                f"{names.suggest_release(name)}"
            ) from cause
        if isinstance(cause, errors.RevisionNotFoundError):
            raise ValueError(f"{preset} has no revision {revision!r}") from cause
        problem = (
            "is not in the local cache, and the hub is unreachable"
            if offline
            else "could not be downloaded"
        )
        raise FileNotFoundError(f"{preset} {problem}: {_one_line(cause)}") from cause
    for path in Path(folder).rglob("*"):
        if path.is_file():
            _check_content(path, start, preset)
    return Path(folder)


def file_names(preset):
    """Return the names of all files of a Hugging Face repository, or [] without network."""
    import huggingface_hub

    name, _, revision = preset.removeprefix("hf://").partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision or None, timeout=TIMEOUT)
    except Exception:  # The names are for a message about another error.
        return []
    return [file.rfilename for file in info.siblings or ()]


def from_kaggle(preset):
    """Download a Kaggle model into kagglehub's cache.

    Args:
        preset: string. `kaggle://org/model/framework/variation[/version]`.

    Returns:
        `pathlib.Path` of the model's folder in the cache.

    Raises:
        ValueError: If the model does not exist or the handle is malformed.
        ImportError: If kagglehub is not installed.
        FileNotFoundError: If the model is gated or cannot be downloaded.
    """
    if not re.fullmatch(r"kaggle://([^/]+/){3}[^/]+(/\d+)?", preset):
        raise ValueError(
            "`preset` must be kaggle://org/model/framework/variation[/version]. "
            f"Received: preset={preset!r}"
        )
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError(f"{preset} needs `pip install kagglehub`") from error
    try:
        return Path(kagglehub.model_download(preset.removeprefix("kaggle://")))
    except Exception as error:  # Its own errors and those of its HTTP library.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            hint = "accept its terms on its page at www.kaggle.com, and set KAGGLE_API_TOKEN"
            raise FileNotFoundError(f"{preset} is gated or private: {hint}") from error
        if status == 404:
            raise ValueError(f"{preset} does not exist, or is private") from error
        raise FileNotFoundError(f"{preset} could not be downloaded: {_one_line(error)}") from error


def _check_content(path, start, preset):
    """Check the SHA-256 of a file that was downloaded after `start`; delete it and raise if wrong.

    The cache names a file by its ETag, which is the SHA-256 of the content of large files.
    huggingface_hub itself checks only the size.
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
            f"{preset} could not be downloaded: {path.name} must have the SHA-256 {blob.name}. "
            f"Received: {found}"
        )


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())
