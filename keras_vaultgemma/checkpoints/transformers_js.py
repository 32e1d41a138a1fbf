"""A model for transformers.js: its decoder step as ONNX, for browsers and Node.

A folder has the config and tokenizer of Hugging Face, and one ONNX file whose name tells
transformers.js its dtype. Weights are in files next to it, written in blocks of one tensor.

References:
    - [dtypes](https://huggingface.co/docs/transformers.js/guides/dtypes)
"""

import json

import numpy as np

from keras_vaultgemma._files import read_json
from keras_vaultgemma._version import __version__
from keras_vaultgemma.checkpoints import decoder_weights
from keras_vaultgemma.checkpoints.decoder_graph import MICROSOFT, DecoderGraph
from keras_vaultgemma.checkpoints.lazy_tensor import as_bytes
from keras_vaultgemma.checkpoints.onnx_format import import_onnx
from keras_vaultgemma.checkpoints.presets import CONFIG

FOLDER = "onnx"
NAMES = {
    "float32": ("fp32", "model"),
    "float16": ("fp16", "model_fp16"),
    decoder_weights.Q8: ("q8", "model_quantized"),
    decoder_weights.Q4: ("q4", "model_q4"),
}
"""For each legal dtype of the matrices, transformers.js's names of it and of the file."""

OPSETS, IR_VERSION = {"": 18, MICROSOFT: 1}, 8
"""Versions of the operators and of the file."""

CHUNK = 1_900_000_000
"""Largest size of one file of weights in bytes, because browsers have no larger buffers than 2 GB.
A larger tensor has a file of its own."""

ALIGNMENT = 4096
"""Bytes. A tensor that starts at a multiple can be mapped into memory."""


def write_decoder(folder, hyperparameters, values, dtype, fields, report):
    """Write the ONNX files of a model, and say in its config.json which they are.

    Args:
        folder: `pathlib.Path` of a folder with a config.json.
        hyperparameters: dict. Constructor arguments of the backbone.
        values: dict of the variables' paths to `LazyTensor`.
        dtype: string. One of `NAMES`.
        fields: dict of strings. Metadata of the ONNX file.
        report: callable. Called with the number of bytes of each block after it is written.
    """
    onnx = import_onnx()
    weights, packed = decoder_weights.decoder_weights(hyperparameters, values, dtype)
    short, name = NAMES[dtype]
    path = folder / FOLDER / f"{name}.onnx"
    path.parent.mkdir()
    places = _places(weights, path.name)
    for name, weight in weights.items():
        file, offset = places[name]
        with path.with_name(file).open("ab") as target:
            target.write(bytes(offset - target.tell()))
            for block in weight.blocks():
                target.write(as_bytes(block))
                report(block.nbytes)
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    graph = DecoderGraph(onnx, hyperparameters, dtypes, packed)
    tensors = [_external(onnx, name, weight, places[name]) for name, weight in weights.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "vaultgemma",
            *graph.inputs_and_outputs(),
            [*graph.constants, *tensors],
        ),
        opset_imports=[onnx.helper.make_opsetid(*pair) for pair in OPSETS.items()],
        ir_version=IR_VERSION,
        producer_name="keras_vaultgemma",
        producer_version=__version__,
    )
    onnx.helper.set_model_props(model, fields)
    path.write_bytes(model.SerializeToString())
    config = read_json(folder / CONFIG)
    config["transformers.js_config"] = {
        "dtype": short,
        "use_external_data_format": {path.name: len({file for file, _ in places.values()})},
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def check_decoder(folder, hyperparameters, values, dtype, report):
    """Raise ValueError for the first tensor that is not what `write_decoder` writes.

    Read by the `onnx` package, whose checker also checks the graph. The arguments are those of
    `write_decoder`.
    """
    onnx = import_onnx()
    path = folder / FOLDER / f"{NAMES[dtype][1]}.onnx"
    onnx.checker.check_model(str(path))
    found = onnx.load(str(path), load_external_data=False).graph.initializer
    found = {tensor.name: tensor for tensor in found}
    weights, _ = decoder_weights.decoder_weights(hyperparameters, values, dtype)
    for name, weight in weights.items():
        tensor = found.get(name)
        is_equal = tensor is not None and tuple(tensor.dims) == weight.shape
        place = {entry.key: entry.value for entry in tensor.external_data} if is_equal else {}
        is_equal = is_equal and int(place["length"]) == weight.nbytes
        data, start = None, 0
        if is_equal:
            data = np.memmap(
                path.with_name(place["location"]), "u1", "r", int(place["offset"]), weight.nbytes
            )
        for block in weight.blocks():
            end = start + block.nbytes
            is_equal = is_equal and np.array_equal(data[start:end], block.reshape(-1).view("u1"))
            start = end
            report(block.nbytes)
        if not is_equal:
            raise ValueError(
                f"{name} must have the same bits in source and target. Received: different bits"
            )


def _places(weights, file):
    """Return the file and the offset in it of each weight, as transformers.js names the files."""
    places, chunk, end = {}, 0, 0
    for name, weight in weights.items():
        start = end + -end % ALIGNMENT
        if start and start + weight.nbytes > CHUNK:
            chunk, start = chunk + 1, 0
        places[name] = f"{file}_data" + (f"_{chunk}" if chunk else ""), start
        end = start + weight.nbytes
    return places


def _external(onnx, name, weight, place):
    """Return a tensor whose values are in a file."""
    tensor = onnx.TensorProto(
        name=name,
        dims=weight.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(weight.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    file, offset = place
    for key, value in {"location": file, "offset": offset, "length": weight.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
