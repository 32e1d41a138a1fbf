"""Safe file access: folders that are written atomically, and JSON files of strangers."""

import contextlib
import json
import os
from pathlib import Path

from keras_vaultgemma._partial_folders import partial_folder

SUPERSEDED = {
    "model.weights.json": "model.weights.h5",
    "model.safetensors.index.json": "model.safetensors",
}
"""Index of sharded weights, and the single file that loaders would prefer to it."""


@contextlib.contextmanager
def new_folder(folder, exclusive=False):
    """Write files to a folder atomically: all of them, or none.

    A context manager. The block writes into a new, empty folder, whose files are moved into
    `folder` when the block ends without an exception; otherwise `folder` is left unchanged. A
    `folder` that does not exist appears complete or not at all. Existing files that the block does
    not write stay, except a single weights file that a new index of shards supersedes.

    SIGTERM and SIGHUP end the block like an exception. What a killed process has left next to the
    target is deleted by the next one.

    Args:
        folder: `pathlib.Path` or string. The target.
        exclusive: bool. If True, raise while another exclusive block writes to the same target, on
            systems that have locks. Defaults to False.

    Yields:
        `pathlib.Path` of the temporary folder, on the file system of the target.

    Raises:
        ValueError: If `folder` or one of its parents is a file.
        FileExistsError: If another exclusive block writes to the target.
        OSError: If the target is not writable.
    """
    target = Path(folder).resolve()
    ancestor = next(path for path in target.parents if path.exists())
    if not ancestor.is_dir():
        raise ValueError(f"{folder} cannot be saved to: {ancestor} is a file, not a folder")
    if target.exists() and not target.is_dir():
        raise ValueError(
            f"{folder} cannot be saved to: it is a file, and must be a folder or not exist yet"
        )
    parent = target.parent
    # A mount point's parent is another file system, and files cannot be renamed across the two.
    if target.is_dir() and (os.path.ismount(target) or not os.access(parent, os.W_OK)):
        parent = target
    with contextlib.ExitStack() as stack:
        try:
            name = target.name if exclusive else None
            temporary = stack.enter_context(partial_folder(parent, name))
        except FileExistsError as error:
            raise FileExistsError(
                f"{folder} is being written by another process. Wait for it, or choose another "
                "folder"
            ) from error
        except OSError as error:
            raise OSError(
                error.errno, f"{folder} cannot be saved to: {error.strerror}", str(parent)
            ) from error
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if target.is_dir():
            _move_files(new, target, old)
        else:
            new.rename(target)


def _move_files(new, target, old):
    """Move the files of `new` into `target` and the files that they replace into `old`.

    If one file cannot be moved, all moves are undone. A killed process leaves no file missing,
    because the old file stays until it is replaced.
    """

    def back_up(name):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(target / name, old / name)
        except OSError:  # The file system has no hard links.
            os.replace(target / name, old / name)
        undo.callback(os.replace, old / name, target / name)

    superseded = [
        single
        for index, single in SUPERSEDED.items()
        if (new / index).is_file() and not (new / single).exists() and (target / single).is_file()
    ]
    with contextlib.ExitStack() as undo:
        for path in sorted(new.rglob("*")):
            destination = target / path.relative_to(new)
            if path.is_dir():
                if not destination.is_dir():
                    destination.mkdir()
                    undo.callback(destination.rmdir)
                continue
            if destination.is_file():
                back_up(path.relative_to(new))
            os.replace(path, destination)
            undo.callback(os.replace, destination, path)
        for name in superseded:
            old.mkdir(exist_ok=True)
            os.replace(target / name, old / name)
            undo.callback(os.replace, old / name, target / name)
        undo.pop_all()


MAX_JSON = 2**23
"""Largest JSON file in bytes. The index of a checkpoint has tens of thousands."""


def read_json(path, max_size=MAX_JSON):
    """Read a JSON object from a file.

    Args:
        path: `pathlib.Path` or string.
        max_size: int. Largest legal size in bytes. Defaults to `MAX_JSON`.

    Returns:
        Dict.

    Raises:
        ValueError: If the file is no JSON object, too large, or a link that leaves its folder. The
            message names the file.
    """
    path = Path(path)
    check_link(path)
    if path.stat().st_size > max_size:
        raise ValueError(
            f"{path} must have at most {max_size} bytes. Received: {path.stat().st_size}"
        )
    return parse_json(path.read_bytes(), path)


def parse_json(text, path):
    """Parse a JSON object.

    Args:
        text: bytes, in UTF-8.
        path: `pathlib.Path` or string. Origin of the bytes, for the message.

    Returns:
        Dict.

    Raises:
        ValueError: If the bytes are no JSON object, are nested too deeply, or repeat a key, of
            which different readers would use different values.
    """

    def without_duplicates(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return content

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object. Received: {type(content).__name__}")
    return content


LINKED_WEIGHTS = (".safetensors", ".h5", ".model", ".spm")
"""Suffixes of weights and vocabularies, which users link from another disk."""


def check_link(path, folder=None):
    """Raise ValueError if a file is a link that leaves its folder.

    Such a link in a stranger's checkpoint could expose any file of the user. Two kinds of links are
    legal: those to the `blobs` of a repository in Hugging Face's cache, in which every file is such
    a link, and absolute ones from weights or a vocabulary to a file of the same type, which a user
    makes to keep large files on another disk. A stranger does not know the user's folders, and
    neither type of file is anything but numbers and pieces.

    Args:
        path: `pathlib.Path` or string.
        folder: `pathlib.Path` or string. Folder that links may not leave. Defaults to the file's
            own.
    """
    if not is_legal_link(path, folder):
        hint = ". If the link is yours, make it absolute" if _is_of_weights(path) else ""
        raise ValueError(
            f"{path} must not be a link that leaves its folder. "
            f"Received: a link to {os.path.realpath(path)}{hint}"
        )


def is_legal_link(path, folder=None):
    """Return False if a file is a link that `check_link` rejects."""
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.is_relative_to(os.path.realpath(path.parent if folder is None else folder)):
        return True
    if target.parent.name == "blobs" and (target.parents[1] / "snapshots").is_dir():
        return True
    return _is_of_weights(path) and os.path.isabs(os.readlink(path))


def _is_of_weights(path):
    """Return True for a link from weights or a vocabulary to a file of the same type."""
    path = Path(path)
    suffix = os.path.splitext(os.path.realpath(path))[1]
    return path.is_symlink() and path.suffix in LINKED_WEIGHTS and suffix == path.suffix


def sync_folder(folder):
    """Flush a folder's entries to disk, so that a new file's name survives a power failure.

    Does nothing on systems that cannot open a folder.

    Args:
        folder: `pathlib.Path` or string.
    """
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def ignore_progress(count):
    """Do nothing. Default of `report` arguments, which are called with a number of bytes."""
