"""Models as graphs for other engines: `convert --to onnx`, `openvino` and `saved_model`."""

import importlib.util
import json
import sys
from shutil import copytree

import keras
import numpy as np
import pytest
from common import error_of, one_layer_preset, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, convert, lora
from keras_vaultgemma.checkpoints import openvino_format

BACKEND = keras.config.backend()
pytestmark = pytest.mark.first_backend
IDS = np.arange(10, dtype="int32").reshape(2, 5) + 1000
INPUTS = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
TEXTS = {
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
}
STATED = {"README.md", "metadata.json"}


def needs(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {missing}")


def logits(preset, **options):
    return to_numpy(VaultGemmaCausalLM.from_preset(preset, **options)(INPUTS))


def run_onnx(folder):
    import onnxruntime

    return onnxruntime.InferenceSession(str(folder / "model.onnx")).run(None, INPUTS)[0]


@needs("onnxruntime")
@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
def test_onnx(tmp_path, dtype):
    source = copytree(one_layer_preset(), tmp_path / "source")
    stated = {**json.loads((source / "metadata.json").read_text()), "privacy": {"epsilon": 2.0}}
    (source / "metadata.json").write_text(json.dumps(stated))
    metadata = convert(source, tmp_path / "new", to="onnx", dtype=dtype, verify=True)
    assert metadata["dtype"] == {None: "float32", "bf16": "bfloat16"}.get(dtype, dtype)
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"model.onnx", "model.onnx.data", *TEXTS, *STATED}
    assert {*metadata["files"], "metadata.json"} == files
    import onnx

    model = onnx.load(tmp_path / "new/model.onnx", load_external_data=False)
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["keras_vaultgemma.privacy"] == "- ε: 2.0"
    embedded = json.loads(props["keras_vaultgemma.metadata"])
    assert embedded == {name: metadata[name] for name in embedded}
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    if dtype == "int8":
        model.quantize("int8")
    difference = np.abs(run_onnx(tmp_path / "new") - to_numpy(model(INPUTS)))
    # Another engine may round an activation that is near a half to another number.
    assert np.median(difference) < {None: 1e-4, "bf16": 0.05, "int8": 1e-4}[dtype]
    assert difference.max() < (1e-4 if dtype is None else 0.2)
    ids = tokenizer(tmp_path / "new")("The fox", add_special_tokens=False)["input_ids"]
    assert ids == list(model.preprocessor.tokenizer("The fox"))


def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@needs("openvino")
def test_openvino(tmp_path):
    metadata = convert(one_layer_preset(), tmp_path / "new", to="openvino", verify=True)
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"model.xml", "model.bin", *TEXTS, *STATED}
    assert {*metadata["files"], "metadata.json"} == files
    run = openvino_format.load_openvino(tmp_path / "new/model.xml")
    assert np.abs(run(INPUTS) - logits(one_layer_preset())).max() < 1e-4
    openvino = openvino_format.import_openvino()
    assert "openvino_telemetry" not in sys.modules  # which would report to others
    info = openvino.Core().read_model(tmp_path / "new/model.xml").get_rt_info()
    assert {"privacy", "metadata"} <= info["keras_vaultgemma"].keys()


@(pytest.mark.long if BACKEND == "jax" else pytest.mark.every_backend)
@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has no SavedModel")
def test_saved_model(tmp_path):
    import tensorflow as tf

    metadata = convert(one_layer_preset(), tmp_path / "new", to="saved_model", verify=True)
    folder = tmp_path / "new"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {*metadata["files"], "metadata.json"} == files
    model = tf.saved_model.load(str(folder))
    assert np.abs(model.serve(INPUTS).numpy() - logits(one_layer_preset())).max() < 1e-4
    size = (folder / "variables/variables.data-00000-of-00001").stat().st_size
    assert size < 1.1 * 4 * metadata["parameter_count"]
    assert model.signatures["serve"].structured_input_signature[1].keys() == INPUTS.keys()
    assert hasattr(model, "generate") == (BACKEND == "tensorflow")


@needs("onnxruntime")
def test_an_adapter_is_merged(tmp_path):
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    lora.add(model, rank=2)
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    lora.save_adapter(model, tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "new", to="onnx")
    assert np.abs(run_onnx(tmp_path / "new") - to_numpy(model(INPUTS))).max() < 1e-3


@needs("onnxruntime")
def test_it_replaces_another_format_and_needs_no_vocabulary(tmp_path):
    model = VaultGemmaCausalLM(random_backbone(vocabulary_size=2000, num_layers=1))
    model.save_to_preset(tmp_path / "source")
    with pytest.warns(UserWarning, match="has no vocabulary"):
        convert(tmp_path / "source", tmp_path / "new", to="onnx")
    with pytest.raises(FileExistsError):
        convert(one_layer_preset(), tmp_path / "new", to="onnx")
    convert(one_layer_preset(), tmp_path / "new", to="keras", overwrite=True)
    assert not (tmp_path / "new/model.onnx").exists()
    assert not (tmp_path / "new/model.onnx.data").exists()


@needs("onnx")
def test_a_damaged_file_is_found(tmp_path, monkeypatch):
    from keras_vaultgemma.checkpoints import onnx_format

    write = onnx_format.write_onnx

    def write_damaged(path, *args, **kwargs):
        write(path, *args, **kwargs)
        with path.with_name("model.onnx.data").open("r+b") as file:
            file.seek(5)
            file.write(b"\xff")

    monkeypatch.setattr(onnx_format, "write_onnx", write_damaged)
    with pytest.raises(ValueError, match="token_embedding/embeddings must have the same bits"):
        convert(one_layer_preset(), tmp_path / "new", to="onnx", verify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (("onnx", "--dtype", "q8_0"), 'must be a floating-point type unless to="gguf"'),
        (("saved_model", "--dtype", "int8"), "`dtype` must be None or one of 'float32'"),
        (("onnx", "--as", "gemma"), "`architecture` must be 'vaultgemma' unless to='hf'"),
    ],
)
def test_options_that_are_rejected(capsys, tmp_path, options, message):
    assert message in error_of(
        capsys, "convert", "vaultgemma_tiny", str(tmp_path / "x"), "--to", *options
    )


@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "torch", reason="the others have a SavedModel")
def test_pytorch_has_no_saved_model(tmp_path):
    with pytest.raises(
        ValueError, match="needs the backend TensorFlow, .* Received: the backend torch"
    ):
        convert("vaultgemma_tiny", tmp_path / "x", to="saved_model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to, package", [("onnx", "onnx"), ("openvino", "openvino")])
def test_missing_packages_are_named(monkeypatch, tmp_path, to, package):
    monkeypatch.setitem(sys.modules, package, None)
    if importlib.util.find_spec("onnx") is None:
        package = "onnx"
    with pytest.raises(ImportError, match=rf'pip install "keras-vaultgemma\[{package}\]"'):
        convert("vaultgemma_tiny", tmp_path / "x", to=to)
