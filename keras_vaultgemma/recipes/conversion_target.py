"""The folder that `convert` writes to: whether it may, and what of an earlier model is deleted."""

import os
from pathlib import Path

from keras_vaultgemma._files import read_json
from keras_vaultgemma.checkpoints import gguf_format, presets
from keras_vaultgemma.checkpoints.metadata import GRAPH_FILES, model_files


def check_target(folder, target, overwrite):
    """Raise an error if `target` exists, and may not be overwritten by a conversion of `folder`."""
    path = Path(target)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists. Pass `overwrite=True` (--overwrite) to replace the model in it"
        )
    if path.resolve() == folder.resolve():
        raise ValueError(
            f"`target` must be another folder than the source. Received: target={target}"
        )
    if path.is_dir() and any(path.iterdir()) and not _holds_model(path):
        raise ValueError(
            f"{target} has no {presets.CONFIG}, so it holds no model and is not overwritten"
        )


def _holds_model(folder):
    return any(
        (folder / name).is_file() for name in (presets.CONFIG, gguf_format.FILE, *GRAPH_FILES)
    )


def old_files(target, reads, written):
    """Return the files that an earlier conversion lists and the new one does not write.

    Args:
        target: `pathlib.Path`.
        reads: set of the names of files that loaders of the new format take for a part of the
            model.
        written: set of the names of the files of the new model.

    Raises:
        ValueError: If another such file would become a part of the new model.
    """
    path = target / presets.METADATA
    listed = read_json(path).get("files") if path.is_file() else {}
    rest = model_files(target, as_names=True) - written if target.is_dir() else set()
    old = rest & {*(listed if isinstance(listed, dict) else {})}
    others = sorted((rest - old) & reads)
    if others:
        raise ValueError(
            f"{target} has {', '.join(others)}, which would become a part of the new model, and "
            "which no conversion lists in its metadata.json. Move it away, or choose another target"
        )
    return [target / name for name in old]
