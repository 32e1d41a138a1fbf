"""Whole checkpoints from one format to another, tensor by tensor."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keras_vaultgemma import checkpoint, presets, saving, weight_layout
from keras_vaultgemma.conversion import hugging_face_folder, keras_preset, model_card, provenance, verification
from keras_vaultgemma.conversion.progress import Progress
from keras_vaultgemma.preprocessor import VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.privacy import ledger as ledgers
from keras_vaultgemma.safetensors_file import write_tensors
from keras_vaultgemma.stored_tensor import DTYPES, widest

FORMATS = ("keras", "hf")
SHARD_SIZE = "5GB"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(source, target, to="keras", dtype=None, shard_size=None, verify=False, overwrite=False, progress=True):
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
    weights = weight_layout.layout(hyperparameters)
    parameter_count = sum(weight.size for weight in weights)

    reading = sum(path.stat().st_size for path in provenance.model_files(folder))
    work = reading + (3 if verify else 2) * parameter_count * dtype.itemsize
    with saving.written_beside(target) as new, Progress(work, progress) as bar, ThreadPoolExecutor(1) as other_core:
        # Hashing leaves the interpreter to others, and takes about as long as everything else together.
        source_digests = other_core.submit(provenance.digests, folder, bar.report)
        if to == "keras":
            keras_preset.write_config(new, hyperparameters, dtype, preprocessor)
            keras_preset.write_weights(new, hyperparameters, values, dtype, bar.report)
        else:
            hugging_face_folder.write_config(new, hyperparameters, dtype, preprocessor, vocabulary)
            tensors = [(weight.places[weight_layout.HUGGING_FACE], values[weight.path]) for weight in weights]
            write_tensors(new, tensors, dtype, _bytes(shard_size or SHARD_SIZE), bar.report)
        if verify:
            verification.check(folder, new, dtype, bar.report)
        metadata = provenance.metadata(source, folder, source_digests.result(), parameter_count, dtype)
        ledger = ledgers.of_preset(folder)
        training = [f"trained privately since: {run}" for run in ledger.describe()]
        if plain := ledger.without_privacy():
            training.append(f"trained without privacy since: {plain}")
        if training:  # a guarantee alone stands in the metadata
            ledger.write(new)
        card = model_card.model_card(to, metadata, hyperparameters, vocabulary is not None, training)
        (new / "README.md").write_text(card, encoding="utf-8")
        metadata["files"] = provenance.digests(new, bar.report)
        (new / presets.METADATA).write_text(json.dumps(metadata, indent=4, ensure_ascii=False), encoding="utf-8")
        written = {path.relative_to(new) for path in provenance.model_files(new)}
    for path in provenance.model_files(target):  # what is left of a model that was there before
        if path.relative_to(target) not in written:
            path.unlink()
    return metadata


def _check(to, dtype, shard_size):
    if to not in FORMATS:
        raise ValueError(f"`to` must be one of {', '.join(FORMATS)}. Received: {to!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be None or one of {', '.join(DTYPES)}. Received: {dtype!r}")
    if shard_size is None:
        return
    if to != "hf":
        raise ValueError(f"`shard_size` goes with to='hf'; a Keras preset has one file. Received: {shard_size!r}")
    _bytes(shard_size)


def _bytes(size):
    """Bytes, from a number or a string with a unit."""
    match = re.fullmatch(r"(\d{1,18})\s*([KMG]B)?", str(size).upper())
    count = int(match[1]) * UNITS[match[2] or ""] if match and not isinstance(size, bool) else 0
    if not count:
        raise ValueError(f"`shard_size` must be bytes above 0, such as 5000000 or '5GB'. Received: {size!r}")
    return count


def _check_target(folder, target, overwrite):
    path = Path(target)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists. Pass overwrite=True (--overwrite) to replace the model in it")
    if path.resolve() == folder.resolve():
        raise ValueError(f"`target` must be another folder than the source. Received: {target}")
    if path.is_dir() and any(path.iterdir()) and not (path / presets.CONFIG).is_file():
        raise ValueError(f"{target} is no model's folder, for it has no {presets.CONFIG}: it is not overwritten")


def _open(folder):
    try:
        return checkpoint.open_values(folder)
    except checkpoint.KerasOnly as error:
        raise ValueError(
            f"{folder} cannot be converted: {error}. A preset in several files can be loaded with `from_preset` and "
            "saved in one with `save_to_preset(..., max_shard_size=...)`; a quantized one has no exact weights any more"
        ) from error
