"""Whole checkpoints from one format to another, tensor by tensor."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keras_vaultgemma._files import new_folder
from keras_vaultgemma.checkpoints import presets, weight_map
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, widest
from keras_vaultgemma.checkpoints.metadata import digests, model_card, model_files, new_metadata
from keras_vaultgemma.checkpoints.reader import KerasOnly, open_values
from keras_vaultgemma.checkpoints.safetensors_format import write_tensors
from keras_vaultgemma.checkpoints.writers import (
    write_hugging_face_config,
    write_keras_config,
    write_keras_weights,
)
from keras_vaultgemma.models.preprocessor import VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.privacy.ledger import preset_ledger
from keras_vaultgemma.recipes.progress import Progress
from keras_vaultgemma.recipes.verification import verify_conversion

FORMATS = ("keras", "hf")
SHARD_SIZE = "5GB"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    source,
    target,
    to="keras",
    dtype=None,
    shard_size=None,
    verify=False,
    overwrite=False,
    progress=True,
):
    """Write a model in another format, with no more than a part of one tensor in memory.

    Args:
        source: what `VaultGemmaCausalLM.from_preset` takes: a Hugging Face checkpoint, a keras-hub `GemmaBackbone`
            preset or a Keras preset of this package, as a folder, handle or bundled name. A preset that was saved with
            LoRA holds the merged weights.
        target: folder to write. It appears whole when everything is done, or not at all.
        to: "keras" for a preset that this package and keras-hub load, "hf" for a folder that transformers loads.
        dtype: "float32", "bfloat16" or "float16". Defaults to the source's; to float32 where that has several.
        shard_size: bytes of weights in one file at most, as a number or as "500MB" or "5GB" (which it is by default).
            Only for "hf".
        verify: compare the two when they are written; see `verification.check`.
        overwrite: replace the model in a `target` that has one; files that are no model's stay.
        progress: show a progress bar on standard error, if that is a terminal.

    Returns:
        The metadata that was written into metadata.json.

    Raises:
        FileExistsError: for a target that exists, without `overwrite`.
        FileNotFoundError: as `presets.find`.
        ValueError: for an argument out of its range, a source that is malformed or quantized, values that do not fit
            into `dtype`, or a target that `verify` found to differ.
    """
    _check(to, dtype, shard_size)
    folder = presets.find(source)
    _check_target(folder, target, overwrite)
    hyperparameters, values = _open(folder)
    dtype = DTYPES[dtype] if dtype else widest(value.dtype for value in values.values())
    vocabulary = presets.file(folder, "vocabulary")
    preprocessor = VaultGemmaCausalLMPreprocessor.from_preset(folder) if vocabulary else None
    weights = weight_map.weight_map(hyperparameters)
    parameter_count = sum(weight.size for weight in weights)

    reading = sum(path.stat().st_size for path in model_files(folder))
    work = reading + (3 if verify else 2) * parameter_count * dtype.itemsize
    with (
        new_folder(target) as new,
        Progress(work, progress) as bar,
        ThreadPoolExecutor(1) as other_core,
    ):
        # Hashing leaves the interpreter to others, and takes about as long as everything else together.
        source_digests = other_core.submit(digests, folder, bar.report)
        if to == "keras":
            write_keras_config(new, hyperparameters, dtype, preprocessor)
            write_keras_weights(new, hyperparameters, values, dtype, bar.report)
        else:
            write_hugging_face_config(new, hyperparameters, dtype, preprocessor, vocabulary)
            tensors = [
                (weight.locations[weight_map.HUGGING_FACE], values[weight.path]) for weight in weights
            ]
            write_tensors(new, tensors, dtype, _bytes(shard_size or SHARD_SIZE), bar.report)
        if verify:
            verify_conversion(folder, new, dtype, bar.report)
        statement = new_metadata(source, folder, source_digests.result(), parameter_count, dtype)
        ledger = preset_ledger(folder)
        training = [f"trained privately since: {run}" for run in ledger.describe()]
        if plain := ledger.without_privacy():
            training.append(f"trained without privacy since: {plain}")
        if training:  # a guarantee alone stands in the metadata
            ledger.write(new)
        card = model_card(to, statement, hyperparameters, vocabulary is not None, training)
        (new / "README.md").write_text(card, encoding="utf-8")
        statement["files"] = digests(new, bar.report)
        (new / presets.METADATA).write_text(
            json.dumps(statement, indent=4, ensure_ascii=False), encoding="utf-8"
        )
        written = {path.relative_to(new) for path in model_files(new)}
    for path in model_files(target):  # what is left of a model that was there before
        if path.relative_to(target) not in written:
            path.unlink()
    return statement


def _check(to, dtype, shard_size):
    if to not in FORMATS:
        raise ValueError(f"`to` must be one of {', '.join(FORMATS)}. Received: {to!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be None or one of {', '.join(DTYPES)}. Received: {dtype!r}")
    if shard_size is None:
        return
    if to != "hf":
        raise ValueError(
            f"`shard_size` goes with to='hf'; a Keras preset has one file. Received: {shard_size!r}"
        )
    _bytes(shard_size)


def _bytes(size):
    """Bytes, from a number or a string with a unit."""
    match = re.fullmatch(r"(\d{1,18})\s*([KMG]B)?", str(size).upper())
    count = int(match[1]) * UNITS[match[2] or ""] if match and not isinstance(size, bool) else 0
    if not count:
        raise ValueError(
            f"`shard_size` must be bytes above 0, such as 5000000 or '5GB'. Received: {size!r}"
        )
    return count


def _check_target(folder, target, overwrite):
    path = Path(target)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists. Pass overwrite=True (--overwrite) to replace the model in it"
        )
    if path.resolve() == folder.resolve():
        raise ValueError(f"`target` must be another folder than the source. Received: {target}")
    if path.is_dir() and any(path.iterdir()) and not (path / presets.CONFIG).is_file():
        raise ValueError(
            f"{target} is no model's folder, for it has no {presets.CONFIG}: it is not overwritten"
        )


def _open(folder):
    try:
        return open_values(folder)
    except KerasOnly as error:
        raise ValueError(
            f"{folder} cannot be converted: {error}. A preset in several files can be loaded with `from_preset` and "
            "saved in one with `save_to_preset(..., max_shard_size=...)`; a quantized one has no exact weights any more"
        ) from error
