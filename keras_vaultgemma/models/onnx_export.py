"""A model in memory as an ONNX file or as OpenVINO's files."""

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma._files import ignore_progress, new_folder
from keras_vaultgemma._partial_folders import partial_folder
from keras_vaultgemma.checkpoints import openvino_format, weight_map
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.checkpoints.onnx_format import write_onnx
from keras_vaultgemma.checkpoints.onnx_graph import TABLE, scale_name
from keras_vaultgemma.checkpoints.onnx_weights import OnnxWeight, norm_weight, of_array


def export_onnx(path, backbone, has_head, fields, **options):
    """Write the ONNX file of a model at `path`, and its weights next to it.

    Args:
        path: `pathlib.Path`.
        backbone: `VaultGemmaBackbone`.
        has_head: bool. True to return logits, False to return hidden states.
        fields: dict of strings. Metadata of the file.
        **options: `has_integer_matmuls` of `OnnxGraph`.
    """
    weights, rounds_activations = _weights(backbone)
    with new_folder(path.parent) as new:
        write_onnx(
            new / path.name,
            backbone.get_config(),
            weights,
            has_head,
            fields,
            ignore_progress,
            rounds_activations=rounds_activations,
            **options,
        )


def export_openvino(path, backbone, has_head, fields):
    """Write OpenVINO's .xml file of a model at `path`, and its .bin file next to it."""
    openvino_format.import_openvino()
    with partial_folder(path.parent.resolve()) as folder, new_folder(path.parent) as new:
        export_onnx(folder / "model.onnx", backbone, has_head, {}, has_integer_matmuls=False)
        openvino_format.write_openvino(new / path.name, folder / "model.onnx", fields)


def _weights(backbone):
    """Return `(weights, rounds_activations)` of a backbone, for `write_onnx`.

    An adapter is merged, one matrix at a time.

    Raises:
        ValueError: If a matrix is quantized to int4, is in int8 and has an adapter, or rounds
            activations in another way than the others or than Keras's default.
    """
    weights, roundings = {}, set()
    for weight in weight_map.weight_map(backbone.get_config()):
        layer = _layer(backbone, weight.path)
        if len(weight.shape) == 1:
            weights[weight.path] = norm_weight(keras.ops.convert_to_numpy(layer.scale))
            continue
        is_table = weight.path == TABLE
        if layer.quantization_mode is None:
            dtype = DTYPES[keras.backend.standardize_dtype(layer.variable_dtype)]
            shape = weight.shape if is_table else weight.shape[::-1]
            weights[weight.path] = OnnxWeight(shape, dtype, _Matrix(layer, is_table))
            continue
        _check_quantized(layer)
        roundings.add(_rounds_activations(layer))
        names = ("table", "embeddings_scale") if is_table else ("kernel", "kernel_scale")
        matrix, scale = (getattr(layer, name) for name in names)
        weights[weight.path] = of_array(backend.numpy_view(matrix))
        scale = backend.numpy_view(scale).astype("float32").reshape(-1)
        weights[scale_name(weight.path)] = of_array(scale)
    if len(roundings) > 1:
        raise ValueError(
            "The quantized layers of an exported model must all round activations, or none of "
            "them. Received: some of either kind"
        )
    return weights, roundings != {False}


class _Matrix:
    """The matrix of a layer in floating point, merged with its adapter, as a function."""

    def __init__(self, layer, is_table):
        self.layer, self.is_table = layer, is_table

    def __call__(self):
        matrix = self.layer.embeddings if self.is_table else self.layer.kernel
        yield np.ascontiguousarray(backend.numpy_view(matrix))


def _layer(backbone, path):
    """Return the layer that has the variable of a path."""
    first, *rest, _ = path.split("/")
    name, _, number = first.rpartition("_")
    layer = (
        backbone.transformer_layers[int(number)]
        if name == "decoder_block"
        else getattr(backbone, first)
    )
    for part in rest:
        layer = getattr(layer, part)
    return layer


def _check_quantized(layer):
    if layer.quantization_mode != "int8":
        raise ValueError(
            "The matrices of an exported model must be in floating point or int8. Received: "
            f"{layer.path} in {layer.quantization_mode}"
        )
    if layer.lora_enabled:
        raise ValueError(
            "The int8 matrices of an exported model must have no adapter; export one over a base "
            f"in floating point. Received: {layer.path} with an adapter"
        )


def _rounds_activations(layer):
    """Return True if a layer rounds its input as Keras does by default, False if it does not."""
    quantizer = layer.inputs_quantizer
    default = keras.quantizers.AbsMaxQuantizer(axis=-1).get_config()
    if quantizer is None:
        return False
    if {**quantizer.get_config(), "axis": None} != {**default, "axis": None}:
        raise ValueError(
            "The activation quantizer of an exported model must be None or Keras's default. "
            f"Received: {quantizer.get_config()} of {layer.path}"
        )
    return True
