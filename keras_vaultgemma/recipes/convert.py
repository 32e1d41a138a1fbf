"""Conversion of whole checkpoints from one format to another, one tensor at a time."""

import functools
import json
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from keras_vaultgemma._files import new_folder
from keras_vaultgemma._validation import check_choice
from keras_vaultgemma.checkpoints import gguf_format, presets, weight_map
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.config_fields import GEMMA_TYPE, MODEL_TYPE
from keras_vaultgemma.checkpoints.dtypes import own_dtype
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, dtype_name, widest
from keras_vaultgemma.checkpoints.metadata import digests, model_files, new_metadata
from keras_vaultgemma.checkpoints.model_card import model_card, training_sentences
from keras_vaultgemma.checkpoints.reader import KerasOnly, open_values
from keras_vaultgemma.models.pieces import check_piece_count
from keras_vaultgemma.models.preprocessor import VaultGemmaCausalLMPreprocessor
from keras_vaultgemma.privacy.ledger import preset_ledger
from keras_vaultgemma.recipes.conversion_target import check_target, old_files
from keras_vaultgemma.recipes.export_formats import BYTES, FORMATS, NEED_TEXT, Conversion
from keras_vaultgemma.recipes.sources import Source, find_source, merged_preset

SHARD_SIZE = "5GB"
SHORT_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""llama.cpp's names of the dtypes."""

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
    architecture: str = MODEL_TYPE,
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
            that transformers loads, "gguf" for a file of llama.cpp and a Modelfile of Ollama,
            "transformers.js" for a folder that generates text in a browser.
            "onnx", "openvino" and "saved_model" are graphs from token ids to logits, which run
            without Keras; on TensorFlow, "saved_model" is also one from strings to strings. It
            needs the whole model in memory. Defaults to "keras".
        dtype: string. "float32", "bfloat16", "float16" (or "f32", "bf16", "f16"), and for
            `to="gguf"` also "q8_0", llama.cpp's 8 bits, for "onnx" and "openvino" also "int8", as
            `quantize` rounds. These two compute in float32 whatever the dtype, and so does
            "transformers.js", which has "float32", "float16", "q8" (as "int8") and "q4". Defaults
            to the dtype of the source, or to float32 if the source has several, or the format does
            not have it.
        shard_size: int or string. Largest size of one weights file, in bytes or as in "500MB". Only
            for `to="hf"`. Defaults to "5GB".
        verify: bool. If True, compare source and target afterwards: every tensor bit by bit, and
            the logits of transformers and this package where transformers and torch are installed
            (not of "gguf" and "transformers.js"). Of graphs, the logits of their own engine; and
            the tensors of "onnx". Defaults to `False`.
        overwrite: bool. If True, replace the model in an existing `target`. Of its other files,
            only those are deleted that an earlier conversion lists in metadata.json. Defaults to
            `False`.
        progress: bool. If True, show a progress bar on standard error if that is a terminal.
            Defaults to `True`.
        architecture: string. "gemma" writes a folder of `to="hf"` as Gemma 1, for engines that know
            Gemma and not VaultGemma. Defaults to "vaultgemma".

    Returns:
        Dict. The content of the new metadata.json.

    Raises:
        FileExistsError: If `target` exists and `overwrite` is False, or another process is
            writing it.
        FileNotFoundError: If the weights of `source` do not exist or cannot be downloaded.
        ImportError: If a package that the format needs is not installed.
        ValueError: If an argument is out of its range, the source is malformed, quantized or in
            several files of Keras, a value does not fit into `dtype`, the format cannot represent
            the model (Gemma 1, and so GGUF, has no soft caps, no sliding layers and one scalar),
            verification fails, or `target` has files that would become a part of the new model.

    Warns:
        UserWarning: If the source has no vocabulary, because the target then has none either. For
            "gguf" and "transformers.js" this is a ValueError.

    Example:

    ```python
    from keras_vaultgemma import convert

    metadata = convert("vaultgemma_tiny", "for_transformers", to="hf", dtype="bfloat16")
    print(metadata["parameter_count"])
    ```
    """
    dtype = SHORT_DTYPES.get(dtype or "", dtype)
    _check_arguments(to, dtype, architecture, shard_size)
    options = dict(
        to=to,
        architecture=architecture,
        shard_size=_parse_size(SHARD_SIZE if shard_size is None else shard_size),
        verify=verify,
        overwrite=overwrite,
        progress=progress,
    )
    source, adapter = find_source(source)
    target = os.path.expanduser(target)
    folder = presets.find(source)
    check_target(folder if adapter is None else Path(adapter), target, overwrite)
    FORMATS[to].check(read_config(folder), architecture, dtype)
    if adapter is None:
        return _convert(source, folder, target, dtype, **options)
    own = own_dtype(folder)
    dtype = dtype or (own if own in DTYPES else None)
    with merged_preset(Source(source, adapter), target) as folder:
        return _convert(source, folder, target, dtype, **options, adapter=adapter)


def _convert(
    source,
    folder,
    target,
    dtype,
    to,
    architecture,
    shard_size,
    verify,
    overwrite,
    progress,
    adapter=None,
):
    """Convert the folder that `source` stands for, with `adapter` merged; see `convert`."""
    hyperparameters, values = _open(folder)
    dtype = dtype or dtype_name(widest(value.dtype for value in values.values()))
    # ONNX Runtime has no bfloat16 on CPUs and in browsers.
    dtype = dtype if dtype in FORMATS[to].dtypes else "float32"
    preprocessor = _open_vocabulary(source, folder, hyperparameters, to)
    parameter_count = sum(weight.size for weight in weight_map.weight_map(hyperparameters))

    # Each byte of the source is hashed; each byte of the target is written, hashed and, with
    # `verify`, compared.
    source_size = sum(path.stat().st_size for path in model_files(folder))
    size = parameter_count * (DTYPES[dtype].itemsize if dtype in DTYPES else BYTES[dtype])
    total = source_size + round((3 if verify else 2) * size)
    with (
        new_folder(target, exclusive=True) as new,
        _progress_bar(total, progress) as bar,
        ThreadPoolExecutor(1) as executor,
    ):
        # Again, because another process may have written it in the meantime.
        check_target(folder, target, overwrite)
        # In a thread, because hashing releases the interpreter lock and takes about as long as
        # everything else together.
        source_digests = executor.submit(digests, folder, bar.update)

        @functools.cache
        def metadata():
            content = new_metadata(source, folder, source_digests.result(), parameter_count, dtype)
            if adapter is not None:
                content["source"]["adapter"] = dict(
                    name=Path(adapter).resolve().name, files=digests(adapter)
                )
            return content

        conversion = Conversion(
            folder,
            hyperparameters,
            values,
            preprocessor,
            dtype,
            architecture,
            shard_size,
            metadata,
            _copy_ledger(folder, new),
        )
        FORMATS[to].write(new, conversion, bar.update)
        if verify:
            FORMATS[to].verify(new, conversion, bar.update)
        card = model_card(
            to,
            metadata(),
            hyperparameters,
            preprocessor is not None,
            conversion.training,
            to == "gguf" or architecture == GEMMA_TYPE,
        )
        (new / "README.md").write_text(card, encoding="utf-8")
        content = {**metadata(), "files": digests(new, bar.update)}
        (new / presets.METADATA).write_text(
            json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8"
        )
        old = old_files(Path(target), FORMATS[to].reads, written=model_files(new, as_names=True))
    for path in old:
        path.unlink()
    return content


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
    training = training_sentences(ledger)
    if training:  # A guarantee without any run is already in the metadata.
        ledger.write(new)
    return training


def _check_arguments(to, dtype, architecture, shard_size):
    check_choice("to", to, FORMATS)
    if dtype == gguf_format.Q8_0 and to != "gguf":
        raise ValueError(
            f'`dtype` must be a floating-point type unless to="gguf". Received: dtype={dtype!r}'
        )
    check_choice("dtype", dtype, FORMATS[to].dtypes, allow_none=True)
    check_choice("architecture", architecture, (MODEL_TYPE, GEMMA_TYPE))
    for name, value, other, why in (
        ("shard_size", shard_size, None, "the others have one file"),
        ("architecture", architecture, MODEL_TYPE, "the others have one architecture"),
    ):
        if value != other and to != "hf":
            raise ValueError(
                f"`{name}` must be {other!r} unless to='hf', because {why}. "
                f"Received: {name}={value!r}"
            )


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


def _open_vocabulary(source, folder, hyperparameters, to):
    """Return the preprocessor of a source. Warn and return None if it has no vocabulary."""
    if presets.file(folder, "vocabulary") is None:
        if to in NEED_TEXT:
            raise ValueError(
                f"{source} must have a vocabulary ({', '.join(presets.FILES['vocabulary'])}), "
                f"because {NEED_TEXT[to]}. Received: none"
            )
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
