"""A model for transformers.js: its decoder step as ONNX, for browsers and Node.

A folder has the config and tokenizer of Hugging Face, and one ONNX file whose name tells
transformers.js its dtype. Weights are in files next to it, written in blocks of one tensor.

References:
    - [dtypes](https://huggingface.co/docs/transformers.js/guides/dtypes)
"""

import json

from keras_vaultgemma._files import read_json
from keras_vaultgemma._version import __version__
from keras_vaultgemma.checkpoints import decoder_weights
from keras_vaultgemma.checkpoints.decoder_graph import MICROSOFT, DecoderGraph
from keras_vaultgemma.checkpoints.lazy_tensor import as_bytes
from keras_vaultgemma.checkpoints.onnx_format import (
    ALIGNMENT,
    IR_VERSION,
    OPSET,
    check_onnx,
    external_tensor,
    import_onnx,
)
from keras_vaultgemma.checkpoints.presets import CONFIG

FOLDER = "onnx"
NAMES = {
    "float32": ("fp32", "model"),
    "float16": ("fp16", "model_fp16"),
    decoder_weights.Q8: ("q8", "model_quantized"),
    decoder_weights.Q4: ("q4", "model_q4"),
}
"""For each legal dtype of the matrices, transformers.js's names of it and of the file."""

OPSETS = {"": OPSET, MICROSOFT: 1}
"""Versions of the operators."""

CHUNK = 1_900_000_000
"""Largest size of one file of weights in bytes, because browsers have no larger buffers than 2 GB.
A larger tensor has a file of its own."""


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
    tensors = [
        external_tensor(onnx, name, weight, *places[name]) for name, weight in weights.items()
    ]
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

    The arguments are those of `write_decoder`.
    """
    weights, _ = decoder_weights.decoder_weights(hyperparameters, values, dtype)
    path = folder / FOLDER / f"{NAMES[dtype][1]}.onnx"
    check_onnx(path, weights, report, full_check=False)


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
