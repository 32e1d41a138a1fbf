"""OpenVINO's files (.xml and .bin), which OpenVINO converts from an ONNX file."""

import importlib
import sys

FILE = "model.xml"
TELEMETRY = "openvino_telemetry"
"""Package of OpenVINO that may be missing."""

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Options with which OpenVINO computes in float32.

By default it computes in bfloat16 on processors that have it, and rounds the activations that int8
matrices are multiplied by."""


def import_openvino():
    """Return the `openvino` package, or raise ImportError that names the extra to install.

    Without its telemetry, which reports every import to its authors unless the user has opted out.
    """
    hides = "openvino" not in sys.modules and TELEMETRY not in sys.modules
    if hides:
        sys.modules[TELEMETRY] = None
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ImportError(
            "OpenVINO's files need the package `openvino`: pip install "
            '"keras-vaultgemma[openvino]"'
        ) from error
    finally:
        if hides:
            del sys.modules[TELEMETRY]


def load_openvino(path):
    """Return a function of a dict of NumPy inputs that computes a file's output in float32."""
    model = import_openvino().compile_model(path, "CPU", EXACT)
    return lambda inputs: model(inputs)[0]


def write_openvino(path, onnx_path, fields):
    """Write the .xml file at `path` and the .bin file next to it.

    Weights keep their dtype, which OpenVINO would round to float16 by default.

    Args:
        path: `pathlib.Path` that ends with ".xml".
        onnx_path: `pathlib.Path` of the ONNX file.
        fields: dict of strings. Metadata of the file.
    """
    openvino = import_openvino()
    # Not `convert_model`, which starts a process that reports to OpenVINO's authors.
    model = openvino.Core().read_model(onnx_path)
    for name, value in fields.items():
        model.set_rt_info(value, name.split("."))
    openvino.save_model(model, path, compress_to_fp16=False)
