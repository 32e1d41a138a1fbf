"""New files into a folder: all of them, or none."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path

SUPERSEDED = {"model.weights.json": "model.weights.h5", "model.safetensors.index.json": "model.safetensors"}
"""The index of weights in several files, and the single file that loaders would read in its place."""


@contextlib.contextmanager
def written_beside(folder):
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
        raise ValueError(f"{folder} cannot be saved to: it is a file, and must be a folder or not exist yet")
    parent = target.parent
    # A mounted volume's parent is another volume, onto which nothing can be renamed.
    if target.is_dir() and (os.path.ismount(target) or not os.access(parent, os.W_OK)):
        parent = target
    beside = parent / f".saving-{uuid.uuid4().hex}"
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, f"{folder} cannot be saved to: {error.strerror}", str(parent)) from error
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
