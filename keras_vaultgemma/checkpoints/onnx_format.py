"""ONNX files: a graph, and its weights in a file next to it, which has no limit of 2 GB.

The optional package `onnx` encodes the graph. Weights are written in blocks of one tensor.

References:
    - [External data](https://onnx.ai/onnx/repo-docs/ExternalData.html)
"""

import importlib

import numpy as np

from keras_vaultgemma._version import __version__
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, as_bytes, check_bits
from keras_vaultgemma.checkpoints.onnx_graph import INPUTS, OnnxGraph
from keras_vaultgemma.checkpoints.onnx_weights import INT8

FILE = "model.onnx"
DATA_SUFFIX = ".data"
TYPES = (*DTYPES, INT8)
"""Legal dtypes of the matrices. Norms and all arithmetic but that of int8 are float32."""

OPSET, IR_VERSION = 18, 8
"""Versions of ONNX 1.13, of 2022, so that older engines read the files."""

ALIGNMENT = 4096
"""Bytes. A tensor that starts at a multiple can be mapped into memory."""

SMALL = 2**16
"""Bytes of a tensor that is not worth mapping."""


def import_onnx():
    """Return the `onnx` package, or raise ImportError that names the extra to install."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            'ONNX files need the package `onnx`: pip install "keras-vaultgemma[onnx]"'
        ) from error


def write_onnx(path, hyperparameters, weights, has_head, fields, report, **options):
    """Write a graph to `path`, and its weights to a file of this name and ".data".

    Args:
        path: `pathlib.Path`.
        hyperparameters: dict. Constructor arguments of the backbone.
        weights: dict of names to `OnnxWeight`.
        has_head: bool. True to return logits, False to return hidden states.
        fields: dict of strings. Metadata of the file.
        report: callable. Called with the number of bytes of each block after it is written.
        **options: `rounds_activations` and `has_integer_matmuls` of `OnnxGraph`.
    """
    onnx = import_onnx()
    types, helper = onnx.TensorProto, onnx.helper
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    graph = OnnxGraph(onnx, hyperparameters, dtypes, has_head, **options)
    width = hyperparameters["vocabulary_size" if has_head else "hidden_dim"]
    axes = ["batch", "length"]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "vaultgemma",
            [helper.make_tensor_value_info(name, types.INT32, axes) for name in INPUTS],
            [helper.make_tensor_value_info(graph.output, types.FLOAT, [*axes, width])],
            [*graph.constants, *_external(onnx, weights, path.name + DATA_SUFFIX)],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="keras_vaultgemma",
        producer_version=__version__,
    )
    helper.set_model_props(model, fields)
    with path.with_name(path.name + DATA_SUFFIX).open("wb") as file:
        for weight in weights.values():
            file.write(bytes(_padding(file.tell(), weight)))
            for block in weight.blocks():
                file.write(as_bytes(block))
                report(block.nbytes)
    path.write_bytes(model.SerializeToString())


def check_onnx(path, weights, report, full_check=True):
    """Raise ValueError for the first tensor of a file that is not what `write_onnx` writes.

    Read by the `onnx` package, whose checker also checks the graph.

    Args:
        path, weights, report: as for `write_onnx`.
        full_check: bool. False where the checker does not know all operators. Defaults to True.
    """
    onnx = import_onnx()
    onnx.checker.check_model(str(path), full_check=full_check)
    graph = onnx.load(str(path), load_external_data=False).graph
    found = {tensor.name: tensor for tensor in graph.initializer}
    for name, weight in weights.items():
        check_bits(name, weight.blocks(), _data(path, found.get(name), weight), report)


def _data(path, tensor, weight):
    """Return the bytes of a tensor of a graph, or None if it is not one like the weight."""
    if tensor is None or tuple(tensor.dims) != tuple(weight.shape):
        return None
    place = {entry.key: entry.value for entry in tensor.external_data}
    if int(place.get("length", -1)) != weight.nbytes:
        return None
    file, start = path.with_name(place["location"]), int(place["offset"])
    return np.memmap(file, "u1", "r", start, weight.nbytes)


def external_tensor(onnx, name, weight, file, offset):
    """Return a tensor of a graph whose values are in a file, from an offset in bytes."""
    tensor = onnx.TensorProto(
        name=name,
        dims=weight.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(weight.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in {"location": file, "offset": offset, "length": weight.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _external(onnx, weights, file):
    """Yield the tensors of a graph whose values are in a file."""
    offset = 0
    for name, weight in weights.items():
        offset += _padding(offset, weight)
        yield external_tensor(onnx, name, weight, file, offset)
        offset += weight.nbytes


def _padding(offset, weight):
    """Return the number of bytes before a tensor that follows `offset` bytes."""
    return -offset % ALIGNMENT if weight.nbytes >= SMALL else -offset % 8
