"""Conversion of whole checkpoints from one format to another, one tensor at a time."""

import json
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from keras_vaultgemma._files import new_folder, read_json
from keras_vaultgemma._validation import check_choice
from keras_vaultgemma.checkpoints import presets, weight_map
from keras_vaultgemma.checkpoints.dtypes import own_dtype
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, widest
from keras_vaultgemma.checkpoints.metadata import digests, model_card, model_files, new_metadata
from keras_vaultgemma.checkpoints.reader import KerasOnly, format_of, open_values
from keras_vaultgemma.checkpoints.safetensors_format import write_tensors
from keras_vaultgemma.checkpoints.writers import (
    TEXT_FILES,
    copy_text_files,
    write_hugging_face_config,
    write_keras_config,
    write_keras_weights,
)
from keras_vaultgemma.models.pieces import check_piece_count
from keras_vaultgemma.models.preprocessor import VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.privacy.ledger import preset_ledger
from keras_vaultgemma.recipes.sources import Source, find_source, merged_preset
from keras_vaultgemma.recipes.verification import verify_conversion

FORMATS = ("keras", "hf")
SHARD_SIZE = "5GB"
READ = {
    "keras": {*presets.FILES["vocabulary"], "preprocessor.json", presets.LEDGER},
    "hf": {*presets.FILES["vocabulary"], *TEXT_FILES, "model.safetensors", presets.LEDGER},
}
"""Files that loaders of a format take for a part of the model next to them."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str = "keras",
    dtype: str | None = None,
    shard_size: int | str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert a checkpoint to another format, with the memory of a part of one tensor.

    Args:
        source: string or path. A Hugging Face checkpoint, a keras-hub `GemmaBackbone` preset or a
            Keras preset of this package, as a folder, a handle (`hf://`, `kaggle://`) or the name
            of a bundled preset. A preset that was saved with LoRA holds the merged weights. Also
            the folder of an adapter that names its base, or one that `finetune` wrote: the adapter
            is merged, for which the whole model is in memory.
        target: string or path. Folder to write. It appears complete at the end, or not at all. One
            conversion at a time writes to it.
        to: string. "keras" for a preset that this package and keras-hub load, "hf" for a folder
            that transformers loads. Defaults to "keras".
        dtype: string. "float32", "bfloat16" or "float16". Defaults to the dtype of the source, or
            to float32 if the source has several.
        shard_size: int or string. Largest size of one weights file, in bytes or as in "500MB". Only
            for `to="hf"`. Defaults to "5GB".
        verify: bool. If True, compare source and target afterwards: every tensor bit by bit, and
            the logits of transformers and this package where transformers and torch are installed.
            Defaults to `False`.
        overwrite: bool. If True, replace the model in an existing `target`. Of its other files,
            only those are deleted that an earlier conversion lists in metadata.json. Defaults to
            `False`.
        progress: bool. If True, show a progress bar on standard error if that is a terminal.
            Defaults to `True`.

    Returns:
        Dict. The content of the new metadata.json.

    Raises:
        FileExistsError: If `target` exists and `overwrite` is False, or another process is
            writing it.
        FileNotFoundError: If the weights of `source` do not exist or cannot be downloaded.
        ValueError: If an argument is out of its range, the source is malformed, quantized or in
            several files of Keras, a value does not fit into `dtype`, verification fails, or
            `target` has files that would become a part of the new model.

    Warns:
        UserWarning: If the source has no vocabulary, because the target then has none either.

    Example:

    ```python
    from keras_vaultgemma import convert

    metadata = convert("vaultgemma_tiny", "for_transformers", to="hf", dtype="bfloat16")
    print(metadata["parameter_count"])
    ```
    """
    _check_arguments(to, dtype, shard_size)
    options = dict(
        to=to, shard_size=shard_size, verify=verify, overwrite=overwrite, progress=progress
    )
    source, adapter = find_source(source)
    target = os.path.expanduser(target)
    if adapter is None:
        folder = presets.find(source)
        _check_target(folder, target, overwrite)
        return _convert(source, folder, target, dtype, **options)
    _check_target(Path(adapter), target, overwrite)
    own = own_dtype(presets.find(source, "config"))
    dtype = dtype or (own if own in DTYPES else None)
    with merged_preset(Source(source, adapter), target) as folder:
        return _convert(source, folder, target, dtype, **options, adapter=adapter)


def _convert(
    source, folder, target, dtype, to, shard_size, verify, overwrite, progress, adapter=None
):
    """Convert the folder that `source` stands for, with `adapter` merged; see `convert`."""
    hyperparameters, values = _open(folder)
    new_dtype = DTYPES[dtype] if dtype else widest(value.dtype for value in values.values())
    preprocessor = _open_vocabulary(source, folder, hyperparameters)
    weights = weight_map.weight_map(hyperparameters)
    parameter_count = sum(weight.size for weight in weights)

    # Each byte of the source is hashed; each byte of the target is written, hashed and, with
    # `verify`, compared.
    source_size = sum(path.stat().st_size for path in model_files(folder))
    total = source_size + (3 if verify else 2) * parameter_count * new_dtype.itemsize
    with (
        new_folder(target, exclusive=True) as new,
        _progress_bar(total, progress) as bar,
        ThreadPoolExecutor(1) as executor,
    ):
        # Again, because another process may have written it in the meantime.
        _check_target(folder, target, overwrite)
        # In a thread, because hashing releases the interpreter lock and takes about as long as
        # everything else together.
        source_digests = executor.submit(digests, folder, bar.update)
        if to == "keras":
            write_keras_config(new, hyperparameters, new_dtype, preprocessor)
            write_keras_weights(new, hyperparameters, values, new_dtype, bar.update)
        else:
            is_hugging_face = format_of(folder) == weight_map.HUGGING_FACE
            vocabulary = None if is_hugging_face else presets.file(folder, "vocabulary")
            write_hugging_face_config(new, hyperparameters, new_dtype, preprocessor, vocabulary)
            if is_hugging_face:
                copy_text_files(folder, new)
            tensors = [
                (weight.locations[weight_map.HUGGING_FACE], values[weight.path])
                for weight in weights
            ]
            write_tensors(
                new, tensors, new_dtype, _parse_size(shard_size or SHARD_SIZE), bar.update
            )
        if verify:
            verify_conversion(folder, new, new_dtype, bar.update)
        metadata = new_metadata(source, folder, source_digests.result(), parameter_count, new_dtype)
        if adapter is not None:
            metadata["source"]["adapter"] = dict(
                name=Path(adapter).resolve().name, files=digests(adapter)
            )
        training = _copy_ledger(folder, new)
        card = model_card(to, metadata, hyperparameters, preprocessor is not None, training)
        (new / "README.md").write_text(card, encoding="utf-8")
        metadata["files"] = digests(new, bar.update)
        (new / presets.METADATA).write_text(
            json.dumps(metadata, indent=4, ensure_ascii=False), encoding="utf-8"
        )
        old = _old_files(Path(target), to, written=model_files(new, as_names=True))
    for path in old:
        path.unlink()
    return metadata


def _progress_bar(total, enabled):
    """Return a tqdm bar in bytes, which is shown only if standard error is a terminal."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not (enabled and is_terminal),
    )


def _copy_ledger(folder, new):
    """Copy the privacy ledger if it lists training. Return a sentence for each run."""
    ledger = preset_ledger(folder)
    training = [f"trained privately since: {run}" for run in ledger.describe()]
    if plain := ledger.without_privacy():
        training.append(f"without privacy since: {plain}")
    if training:  # A guarantee without any run is already in the metadata.
        ledger.write(new)
    return training


def _check_arguments(to, dtype, shard_size):
    check_choice("to", to, FORMATS)
    check_choice("dtype", dtype, DTYPES, allow_none=True)
    if shard_size is None:
        return
    if to != "hf":
        raise ValueError(
            "`shard_size` must be None unless to='hf', because a Keras preset has one file. "
            f"Received: shard_size={shard_size!r}"
        )
    _parse_size(shard_size)


def _parse_size(size):
    """Return a number of bytes from an integer or a string with a unit."""
    match = re.fullmatch(r"(\d{1,18})\s*([KMG]B)?", str(size).upper())
    count = int(match[1]) * UNITS[match[2] or ""] if match and not isinstance(size, bool) else 0
    if not count:
        raise ValueError(
            "`shard_size` must be a positive number of bytes, such as 5000000 or '5GB'. "
            f"Received: shard_size={size!r}"
        )
    return count


def _check_target(folder, target, overwrite):
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
    if path.is_dir() and any(path.iterdir()) and not (path / presets.CONFIG).is_file():
        raise ValueError(
            f"{target} has no {presets.CONFIG}, so it holds no model and is not overwritten"
        )


def _old_files(target, to, written):
    """Return the files that an earlier conversion lists and the new one does not write.

    Raises:
        ValueError: If another such file would become a part of the new model.
    """
    path = target / presets.METADATA
    listed = read_json(path).get("files") if path.is_file() else {}
    rest = model_files(target, as_names=True) - written if target.is_dir() else set()
    old = rest & {*(listed if isinstance(listed, dict) else {})}
    others = sorted((rest - old) & READ[to])
    if others:
        raise ValueError(
            f"{target} has {', '.join(others)}, which would become a part of the new model, and "
            "which no conversion lists in its metadata.json. Move it away, or choose another target"
        )
    return [target / name for name in old]


def _open_vocabulary(source, folder, hyperparameters):
    """Return the preprocessor of a source. Warn and return None if it has no vocabulary."""
    if presets.file(folder, "vocabulary") is None:
        warnings.warn(
            f"{source} has no vocabulary ({', '.join(presets.FILES['vocabulary'])}), so the "
            "converted model works on token ids only (`preprocessor=None`)",
            stacklevel=3,
        )
        return None
    preprocessor = VaultGemmaCausalLMPreprocessor.from_preset(folder)
    check_piece_count(preprocessor, hyperparameters["vocabulary_size"])
    return preprocessor


def _open(folder):
    try:
        return open_values(folder)
    except KerasOnly as error:
        raise ValueError(
            f"{folder} cannot be converted: {error}. Load a preset in several files with "
            "`from_preset` and save it in one with `save_to_preset(..., max_shard_size=...)`. A "
            "quantized preset no longer has the exact weights"
        ) from error
