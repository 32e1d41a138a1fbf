"""New files into a folder: all of them, or none."""

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path

SUPERSEDED = {
    "model.weights.json": "model.weights.h5",
    "model.safetensors.index.json": "model.safetensors",
}
"""The index of weights in several files, and the single file that loaders would read in its place."""


@contextlib.contextmanager
def new_folder(folder):
    """A new, empty folder for the `with` block to write into; its files become those of `folder` when the block ends.

    Until then, and for good where anything fails, `folder` stays as it was; one that does not exist appears whole or
    not at all. Files that are not written anew stay, but for a single weights file that an index of several supersedes.

    Raises:
        ValueError: where `folder` or a folder above it is a file.
        OSError: where nothing can be written there.
    """
    target = Path(folder).resolve()
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        raise ValueError(f"{folder} cannot be saved to: {above} is a file, not a folder")
    if target.exists() and not target.is_dir():
        raise ValueError(
            f"{folder} cannot be saved to: it is a file, and must be a folder or not exist yet"
        )
    parent = target.parent
    # A mounted volume's parent is another volume, onto which nothing can be renamed.
    if target.is_dir() and (os.path.ismount(target) or not os.access(parent, os.W_OK)):
        parent = target
    beside = parent / f".saving-{uuid.uuid4().hex}"
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            error.errno, f"{folder} cannot be saved to: {error.strerror}", str(parent)
        ) from error
    try:
        new, old = beside / "new", beside / "old"
        new.mkdir()
        yield new
        if target.is_dir():
            _move_files(new, target, old)
        else:
            new.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _move_files(new, target, old):
    """Move the files of `new` into `target`, and those they replace into `old`; where one cannot be moved, undo all.

    Nor does a process that is killed leave a file missing: the old one is in its place until the new one is.
    """

    def keep(name):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(target / name, old / name)
        except OSError:  # a file system without links
            os.replace(target / name, old / name)
        undo.callback(os.replace, old / name, target / name)

    superseded = [
        single
        for index, single in SUPERSEDED.items()
        if (new / index).is_file() and not (new / single).exists() and (target / single).is_file()
    ]
    with contextlib.ExitStack() as undo:
        for path in sorted(new.rglob("*")):
            place = target / path.relative_to(new)
            if path.is_dir():
                if not place.is_dir():
                    place.mkdir()
                    undo.callback(place.rmdir)
                continue
            if place.is_file():
                keep(path.relative_to(new))
            os.replace(path, place)
            undo.callback(os.replace, place, path)
        for name in superseded:
            old.mkdir(exist_ok=True)
            os.replace(target / name, old / name)
            undo.callback(os.replace, old / name, target / name)
        undo.pop_all()


MAX_JSON = 2**23
"""Bytes of a JSON file; a config has thousands and the index of a checkpoint of this model tens of thousands."""


def read_json(path):
    """A JSON object from a file.

    Raises:
        ValueError: names the file where it is not one, too large, or a link that leaves its folder.
    """
    path = Path(path)
    check_link(path)
    if path.stat().st_size > MAX_JSON:
        raise ValueError(
            f"{path} must have at most {MAX_JSON} bytes. Received: {path.stat().st_size}"
        )
    return parse_json(path.read_bytes(), path)


def parse_json(text, path):
    """A JSON object from the bytes of a file, or of a part of it.

    Raises:
        ValueError: names the file where it is not one, nested too deep, or has a key twice (of which readers would take
            different ones).
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


def check_link(path):
    """Raise ValueError where a file is a link out of its folder, which could show a stranger's checkpoint any file.

    In Hugging Face's cache every file is a link into the repository's `blobs`, and that is fine.
    """
    path = Path(path)
    if not path.is_symlink():
        return
    folder = path.parent.absolute()
    caches = [place.parent for place in (folder, *folder.parents) if place.name == "snapshots"]
    places = [folder.resolve(), *(cache.resolve() / "blobs" for cache in caches)]
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise ValueError(
            f"{path} is a link that leaves its folder, to {path.resolve()}: it is not followed"
        )


def sync_folder(folder):
    """The name of a new file is on the disk too, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
