"""Formats of `convert` that hold the computation, and run without Keras: ONNX and others."""

import importlib
import importlib.util
import json
import tempfile
from pathlib import Path

from keras_vaultgemma import backend
from keras_vaultgemma.checkpoints import onnx_format, openvino_format
from keras_vaultgemma.checkpoints.model_card import privacy_sentences
from keras_vaultgemma.checkpoints.onnx_weights import checkpoint_weights
from keras_vaultgemma.models.causal_lm import VaultGemmaCausalLM
from keras_vaultgemma.recipes.verification import verify_exported_logits

SAVED_MODEL_FILE = "saved_model.pb"


def write_onnx(folder, conversion, report):
    _write_graph(folder / onnx_format.FILE, conversion, statements(conversion), report)


def verify_onnx(folder, conversion, report):
    path = folder / onnx_format.FILE
    onnx_format.check_onnx(path, _weights(conversion), report)
    if importlib.util.find_spec("onnxruntime") is None:
        return
    session = importlib.import_module("onnxruntime").InferenceSession(str(path))
    verify_exported_logits(
        conversion.folder, conversion.dtype, lambda inputs: session.run(None, inputs)[0]
    )


def check_onnx(hyperparameters, architecture, dtype):
    onnx_format.import_onnx()


def write_openvino(folder, conversion, report):
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        onnx = Path(temporary) / onnx_format.FILE
        _write_graph(onnx, conversion, {}, report, has_integer_matmuls=False)
        openvino_format.write_openvino(folder / openvino_format.FILE, onnx, statements(conversion))


def verify_openvino(folder, conversion, report):
    run = openvino_format.load_openvino(folder / openvino_format.FILE)
    verify_exported_logits(conversion.folder, conversion.dtype, run)


def check_openvino(hyperparameters, architecture, dtype):
    onnx_format.import_onnx()
    openvino_format.import_openvino()


def write_saved_model(folder, conversion, report):
    has_text = conversion.preprocessor is not None
    options = {} if has_text else {"preprocessor": None}
    model = VaultGemmaCausalLM.from_preset(conversion.folder, dtype=conversion.dtype, **options)
    can_tokenize = importlib.util.find_spec("tensorflow_text") is not None
    generate = has_text and "text" in backend.SAVED_MODEL_KINDS and can_tokenize
    model.export(folder, verbose=False, generate=generate)
    report(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def verify_saved_model(folder, conversion, report):
    run = backend.load_saved_model(folder)
    verify_exported_logits(conversion.folder, conversion.dtype, run)


def check_saved_model(hyperparameters, architecture, dtype):
    if not backend.SAVED_MODEL_KINDS:
        raise ValueError(
            'to="saved_model" needs the backend TensorFlow, or JAX next to an installed '
            f"TensorFlow: set KERAS_BACKEND. Received: the backend {backend.NAME}"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            'to="saved_model" needs the package `tensorflow`: pip install '
            '"keras-vaultgemma[tensorflow]"'
        )


def _write_graph(path, conversion, fields, report, **options):
    onnx_format.write_onnx(
        path, conversion.hyperparameters, _weights(conversion), True, fields, report, **options
    )


def _weights(conversion):
    return checkpoint_weights(conversion.hyperparameters, conversion.values, conversion.dtype)


def statements(conversion):
    """Return what is known about privacy and origin, as metadata of a file."""
    metadata = conversion.metadata()
    return {
        "keras_vaultgemma.privacy": "\n".join(privacy_sentences(metadata, conversion.training)),
        "keras_vaultgemma.metadata": json.dumps(metadata, ensure_ascii=False),
    }
