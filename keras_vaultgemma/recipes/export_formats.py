"""The table of formats that `convert` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from keras_vaultgemma.checkpoints import (
    decoder_weights,
    gguf_format,
    modelfile,
    onnx_format,
    onnx_weights,
    presets,
    transformers_js,
    weight_map,
)
from keras_vaultgemma.checkpoints.chat_template import chat_template
from keras_vaultgemma.checkpoints.config_fields import GEMMA_TYPE
from keras_vaultgemma.checkpoints.gemma import check_is_gemma
from keras_vaultgemma.checkpoints.hugging_face_folder import (
    TEXT_FILES,
    copy_text_files,
    write_fast_tokenizer,
    write_hugging_face_config,
)
from keras_vaultgemma.checkpoints.keras_folder import write_keras_config, write_keras_weights
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.checkpoints.reader import format_of
from keras_vaultgemma.checkpoints.safetensors_format import write_tensors
from keras_vaultgemma.checkpoints.sentencepiece_format import read_pieces
from keras_vaultgemma.checkpoints.tokenizer_json import FILE
from keras_vaultgemma.checkpoints.vocabulary import read_vocabulary
from keras_vaultgemma.recipes import graph_formats
from keras_vaultgemma.recipes.verification import verify_conversion


class Conversion(NamedTuple):
    """What is converted, and as what.

    Attributes:
        folder: `pathlib.Path` of the source.
        hyperparameters: dict. Constructor arguments of the backbone.
        values: dict of the variables' paths to `LazyTensor`.
        preprocessor: `VaultGemmaCausalLMPreprocessor`, or None.
        dtype: string.
        architecture: string, "vaultgemma" or "gemma".
        shard_size: int. Largest size of one weights file, in bytes.
        metadata: callable that returns the content of metadata.json, without the digests of the new
            files.
        training: list of strings. One sentence for each training run in the privacy ledger.
    """

    folder: Path
    hyperparameters: dict[str, Any]
    values: dict[str, Any]
    preprocessor: Any
    dtype: str
    architecture: str
    shard_size: int
    metadata: Callable[[], dict[str, Any]]
    training: list[str]


class Format(NamedTuple):
    """A format of `convert`.

    Attributes:
        write: callable. Takes an empty folder, a `Conversion`, and a callable that is called with
            the number of bytes of each block after it is written.
        verify: callable. Takes the same and raises ValueError if the folder has other weights than
            the source.
        check: callable. Takes the hyperparameters, `architecture` and `dtype`, before anything is
            written, and raises an error if the format cannot represent the model.
        reads: set of the files that loaders take for a part of the model next to them.
        dtypes: tuple of strings.
    """

    write: Callable[[Path, Conversion, Callable], None]
    verify: Callable[[Path, Conversion, Callable], None]
    check: Callable[[dict[str, Any], str, str | None], None]
    reads: set[str]
    dtypes: tuple[str, ...]


def _write_keras(folder, conversion, report):
    hyperparameters, dtype = conversion.hyperparameters, DTYPES[conversion.dtype]
    write_keras_config(folder, hyperparameters, dtype, conversion.preprocessor)
    write_keras_weights(folder, hyperparameters, conversion.values, dtype, report)


def _write_texts(folder, conversion, is_fast=True):
    """Write the config and the tokenizer of Hugging Face's format; if `is_fast`, as JSON too."""
    source, architecture = conversion.folder, conversion.architecture
    is_hugging_face = format_of(source) in weight_map.SAFETENSORS
    write_hugging_face_config(
        folder,
        conversion.hyperparameters,
        DTYPES.get(conversion.dtype, DTYPES["float32"]),
        conversion.preprocessor,
        None if is_hugging_face else presets.file(source, "vocabulary"),
        architecture,
    )
    if is_hugging_face:
        copy_text_files(source, folder)
    if is_fast and conversion.preprocessor is not None and not (folder / FILE).exists():
        write_fast_tokenizer(folder, _pieces(conversion))


def _with_texts(write):
    """Return `write` such that it also writes a tokenizer, which transformers loads."""

    def write_all(folder, conversion, report):
        _write_texts(folder, conversion)
        write(folder, conversion, report)

    return write_all


def _write_hugging_face(folder, conversion, report):
    is_gemma = conversion.architecture == GEMMA_TYPE
    _write_texts(folder, conversion, is_fast=is_gemma)
    name = weight_map.GEMMA if is_gemma else weight_map.HUGGING_FACE
    tensors = [
        (weight.locations[name], conversion.values[weight.path])
        for weight in weight_map.weight_map(conversion.hyperparameters)
    ]
    write_tensors(folder, tensors, DTYPES[conversion.dtype], conversion.shard_size, report)


def _write_transformers_js(folder, conversion, report):
    transformers_js.write_decoder(
        folder,
        conversion.hyperparameters,
        conversion.values,
        conversion.dtype,
        _statements(conversion),
        report,
    )


def _write_gguf(folder, conversion, report):
    tokenizer = conversion.preprocessor.tokenizer
    template = chat_template(conversion.folder, tokenizer)
    fields = {
        **_statements(conversion),
        "bos_token_id": tokenizer.start_token_id,
        "eos_token_id": tokenizer.end_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "unk_token_id": tokenizer.token_to_id("<unk>"),
    }
    if tokenizer.end_of_turn_id is not None:
        fields["eot_token_id"] = tokenizer.end_of_turn_id
    if template is not None:
        fields["chat_template"] = template
    gguf_format.write_gguf(
        folder / gguf_format.FILE,
        conversion.hyperparameters,
        conversion.values,
        conversion.dtype,
        _pieces(conversion),
        fields,
        report,
    )
    text = modelfile.modelfile(template, conversion.hyperparameters["max_sequence_length"])
    (folder / modelfile.FILE).write_text(text, encoding="utf-8")


def _statements(conversion):
    """Return what a file of weights says about itself, its privacy and its origin."""
    metadata = conversion.metadata()
    return {
        "name": Path(metadata["source"].get("adapter", metadata["source"])["name"]).name,
        "description": str(metadata.get("description") or ""),
        "license": str(metadata.get("license") or ""),
        **graph_formats.statements(conversion),
    }


def _pieces(conversion):
    return read_pieces(read_vocabulary(conversion.folder))


def _verify_folder(folder, conversion, report):
    verify_conversion(conversion.folder, folder, DTYPES[conversion.dtype], report)


def _verify_gguf(folder, conversion, report):
    gguf_format.check_gguf(
        folder / gguf_format.FILE,
        conversion.hyperparameters,
        conversion.values,
        conversion.dtype,
        report,
    )


def _verify_transformers_js(folder, conversion, report):
    transformers_js.check_decoder(
        folder, conversion.hyperparameters, conversion.values, conversion.dtype, report
    )


def _check_hugging_face(hyperparameters, architecture, dtype):
    if architecture == GEMMA_TYPE:
        check_is_gemma(hyperparameters)


def _check_gguf(hyperparameters, architecture, dtype):
    gguf_format.import_gguf()
    check_is_gemma(hyperparameters)
    gguf_format.check_blocks(hyperparameters, dtype)


def _check_transformers_js(hyperparameters, architecture, dtype):
    onnx_format.import_onnx()
    decoder_weights.check_blocks(hyperparameters, dtype)


NEED_TEXT = {
    "gguf": "a GGUF file holds one",
    "transformers.js": "transformers.js generates text with one",
}
"""Formats that need a vocabulary, and why."""

BYTES = {
    gguf_format.Q8_0: gguf_format.Q8_0_BYTES,
    onnx_weights.INT8: 1,
    **decoder_weights.BYTES,
}
"""Bytes of a value in each dtype that is not in floating point."""

FORMATS = {
    "keras": Format(
        _write_keras,
        _verify_folder,
        lambda *_: None,
        {*presets.FILES["vocabulary"], "preprocessor.json", presets.LEDGER},
        tuple(DTYPES),
    ),
    "hf": Format(
        _write_hugging_face,
        _verify_folder,
        _check_hugging_face,
        {*presets.FILES["vocabulary"], *TEXT_FILES, "model.safetensors", presets.LEDGER},
        tuple(DTYPES),
    ),
    "gguf": Format(
        _write_gguf, _verify_gguf, _check_gguf, {presets.LEDGER}, tuple(gguf_format.TYPES)
    ),
    "transformers.js": Format(
        _with_texts(_write_transformers_js),
        _verify_transformers_js,
        _check_transformers_js,
        {*presets.FILES["vocabulary"], *TEXT_FILES, presets.LEDGER},
        tuple(transformers_js.NAMES),
    ),
    "onnx": Format(
        _with_texts(graph_formats.write_onnx),
        graph_formats.verify_onnx,
        graph_formats.check_onnx,
        {*presets.FILES["vocabulary"], *TEXT_FILES, presets.LEDGER},
        onnx_format.TYPES,
    ),
    "openvino": Format(
        _with_texts(graph_formats.write_openvino),
        graph_formats.verify_openvino,
        graph_formats.check_openvino,
        {*presets.FILES["vocabulary"], *TEXT_FILES, presets.LEDGER},
        onnx_format.TYPES,
    ),
    "saved_model": Format(
        graph_formats.write_saved_model,
        graph_formats.verify_saved_model,
        graph_formats.check_saved_model,
        {presets.LEDGER},
        tuple(DTYPES),
    ),
}
