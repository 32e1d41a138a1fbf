"""GGUF, llama.cpp's file of a whole model: weights, vocabulary, chat template and statements.

The architecture is llama.cpp's "gemma", Gemma 1, which adds no 1 to the weights of its norms. The
optional package `gguf`, of llama.cpp's authors, writes the header and rounds to Q8_0. Weights are
written in blocks of one tensor, so that no tensor has to fit into memory.

References:
    - [Format](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

import importlib

import numpy as np

from keras_vaultgemma.checkpoints import weight_map
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, as_bytes, check_bits
from keras_vaultgemma.checkpoints.sentencepiece_format import UNUSED, Piece

FILE = "model.gguf"
Q8_0 = "q8_0"
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", Q8_0: "Q8_0"}
"""GGUF's name of each legal type of the matrices. Norms are always F32, as llama.cpp needs them."""

Q8_0_BYTES = 34 / 32
"""Bytes of a value in Q8_0: blocks of 32 integers have a scale of two bytes."""

FILE_TYPES = {
    "float32": "ALL_F32",
    "float16": "MOSTLY_F16",
    "bfloat16": "MOSTLY_BF16",
    Q8_0: "MOSTLY_Q8_0",
}


def import_gguf():
    """Return the `gguf` package, or raise ImportError that names the extra to install."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            'to="gguf" needs the package `gguf`: pip install "keras-vaultgemma[gguf]"'
        ) from error


def check_blocks(hyperparameters, dtype):
    """Raise ValueError for the first matrix whose rows are no whole number of Q8_0's blocks."""
    if dtype != Q8_0:
        return
    for weight in weight_map.weight_map(hyperparameters):
        if len(weight.shape) > 1 and weight.shape[-1] % 32:
            raise ValueError(
                f"dtype={Q8_0!r} rounds blocks of 32 values, so that the rows of {weight.path} "
                f"must be a multiple of 32. Received: rows of {weight.shape[-1]}"
            )


def write_gguf(path, hyperparameters, values, dtype, pieces, fields, report):
    """Write one GGUF file.

    Args:
        path: `pathlib.Path`.
        hyperparameters: dict. Constructor arguments of the backbone, as `reader.open_values`
            returns them, which `gemma.check_is_gemma` and `check_blocks` accept.
        values: dict of the variables' paths to `LazyTensor`.
        dtype: string. One of `TYPES`.
        pieces: list of `Piece`, at most as many as the embedding has rows.
        fields: dict of the writer's methods without "add_" to their argument, such as
            `{"name": "a name"}`, or of other keys to strings.
        report: callable. Called with the number of bytes of each block after it is written.
    """
    gguf, h = import_gguf(), hyperparameters
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GEMMA])
    methods = {
        "type": gguf.GGUFType.MODEL,
        "file_type": gguf.LlamaFileType[FILE_TYPES[dtype]],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "vocab_size": h["vocabulary_size"],
        "context_length": h["max_sequence_length"],
        "embedding_length": h["hidden_dim"],
        "block_count": h["num_layers"],
        "feed_forward_length": h["intermediate_dim"],
        "head_count": h["num_query_heads"],
        "head_count_kv": h["num_key_value_heads"],
        "key_length": h["head_dim"],
        "value_length": h["head_dim"],
        "layer_norm_rms_eps": h["layer_norm_epsilon"],
        "rope_freq_base": h["rope_theta"],
        **_vocabulary(pieces, h["vocabulary_size"]),
    }
    for name, value in {**methods, **fields}.items():
        add = getattr(writer, f"add_{name}", None)
        add(value) if add else writer.add_string(name, value)
    tensors = list(_tensors(gguf, hyperparameters, values, dtype))
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype("f4"), tensor.nbytes, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            for block in tensor.blocks():
                file.write(as_bytes(block))
                report(block.nbytes)
        writer.write_padding(file, file.tell())


def check_gguf(path, hyperparameters, values, dtype, report):
    """Raise ValueError for the first tensor of a file that is not what `write_gguf` writes.

    Read by the `gguf` package. The arguments are those of `write_gguf`.
    """
    gguf = import_gguf()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in _tensors(gguf, hyperparameters, values, dtype):
        other = found.pop(tensor.name, None)
        is_equal = other is not None and other.tensor_type == tensor.type
        is_equal = is_equal and tuple(other.shape) == tensor.shape[::-1]
        data = other.data.reshape(-1).view("u1") if is_equal else None
        check_bits(tensor.name, tensor.blocks(), data, report)
    if found:
        raise ValueError(f"{path} must have no further tensors. Received: {sorted(found)[0]}")


class _Tensor:
    """A weight as GGUF stores it: in the layout of Hugging Face's Gemma."""

    def __init__(self, gguf, weight, value, dtype, name):
        self.location = weight.locations[weight_map.GEMMA]
        self.name, self.shape, self.value = name, self.location.shape, value
        self.is_norm = len(self.shape) == 1
        self.dtype = "float32" if self.is_norm else dtype
        self.type = gguf.GGMLQuantizationType[TYPES[self.dtype]]
        values, size = gguf.GGML_QUANT_SIZES[self.type]
        self.nbytes = weight.size // values * size
        self.quantize = gguf.quantize

    def blocks(self):
        """Yield the encoded rows in arrays of at most a few megabytes."""
        is_quantized = self.dtype == Q8_0
        for block in self.value.blocks(
            self.location, DTYPES["float32" if is_quantized else self.dtype]
        ):
            if is_quantized:
                block = self.quantize(block, self.type)
            yield block + np.float32(1) if self.is_norm else block


def _tensors(gguf, hyperparameters, values, dtype):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA, hyperparameters["num_layers"])
    for weight in weight_map.weight_map(hyperparameters):
        theirs = weight.locations[weight_map.GEMMA].name
        name = names.get_name(theirs, try_suffixes=(".weight",))
        yield _Tensor(gguf, weight, values[weight.path], dtype, name)


def _vocabulary(pieces, count):
    """Return the fields of a vocabulary, filled up to `count` pieces."""
    filled = [*pieces, *[Piece("", kind=UNUSED)] * (count - len(pieces))]
    # llama.cpp would return unused pieces, SentencePiece does not. No text has a space there.
    texts = [
        f"<unused {i}>" if piece.kind == UNUSED else piece.text for i, piece in enumerate(filled)
    ]
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": texts,
        "token_scores": [piece.score for piece in filled],
        "token_types": [piece.kind for piece in filled],
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
