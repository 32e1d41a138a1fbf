"""Exported models, each opened by its own engine, next to the model."""

import importlib.util

import keras
import numpy as np
import pytest
from common import one_layer_preset, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, lora
from keras_vaultgemma.checkpoints import openvino_format

pytestmark = pytest.mark.first_backend

BACKEND = keras.config.backend()
NEEDS = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")
    for name in ("onnxruntime", "openvino", "tensorflow")
}
ALL_FEATURES = dict(
    num_layers=2,
    num_key_value_heads=2,
    attention_logit_soft_cap=20.0,
    final_logit_soft_cap=10.0,
    layer_types=["sliding_attention", "full_attention"],
    sliding_window_size=3,
    query_pre_attn_scalar=7.0,
)


def batch(model):
    """Rows that are one text, padded on either side, and packed."""
    size = getattr(model, "backbone", model).vocabulary_size
    ids = np.random.default_rng(0).integers(0, size, (3, 9)).astype("int32")
    mask = np.ones_like(ids)
    mask[0, -3:], mask[1, :2], mask[2, 4:] = 0, 0, 2
    return {"token_ids": ids, "padding_mask": mask}


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda inputs: session.run(None, inputs)[0]


def openvino(path):
    return openvino_format.load_openvino(path)


def saved_model(path):
    import tensorflow as tf

    model = tf.saved_model.load(path)
    return lambda inputs: model.serve(inputs).numpy()


ENGINES = {
    "onnx": (onnx, ".onnx"),
    "openvino": (openvino, ".xml"),
    "tf_saved_model": (saved_model, ""),
}
FILES = [
    pytest.param("onnx", marks=NEEDS["onnxruntime"]),
    pytest.param("openvino", marks=NEEDS["openvino"]),
]
FORMATS = [
    *FILES,
    pytest.param(
        "tf_saved_model",
        marks=[
            NEEDS["tensorflow"],
            pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has no SavedModel"),
        ],
    ),
]


def export(model, folder, format):
    """Return a function of inputs that computes with the exported model."""
    load, suffix = ENGINES[format]
    path = str(folder / f"model{suffix}")
    model.export(path, format=format, verbose=False)
    return load(path)


def check_equal(run, model):
    """Compare logits at tokens, in a batch and as a part of one with more rows and columns."""
    inputs = batch(model)
    expected, is_token = to_numpy(model(inputs)), inputs["padding_mask"] > 0
    found = run(inputs)
    assert found.dtype == "float32" and np.isfinite(found).all()
    assert np.abs(found - expected)[is_token].max() < 1e-4
    larger = {name: np.pad(x, ((0, 1), (0, 40))) for name, x in inputs.items()}
    found = run(larger)[:-1, :-40]
    assert np.abs(found - expected)[is_token].max() < 1e-4


@pytest.mark.every_backend
@pytest.mark.parametrize("format", FORMATS)
def test_logits(format, tmp_path):
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    check_equal(export(model, tmp_path, format), model)


@pytest.mark.parametrize("format", FORMATS)
def test_all_features(format, tmp_path):
    model = VaultGemmaCausalLM(random_backbone(**ALL_FEATURES))
    check_equal(export(model, tmp_path, format), model)


@NEEDS["onnxruntime"]
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "lora", "backbone"])
def test_kinds_of_models(kind, tmp_path):
    """Weights of 16 bits are computed with in float32."""
    is_narrow = kind in ("bfloat16", "float16")
    backbone = random_backbone(num_layers=1, dtype=kind if is_narrow else "float32")
    model = expected = backbone if kind == "backbone" else VaultGemmaCausalLM(backbone)
    if kind == "lora":
        lora.add(model, rank=2, targets=["query", "down", "token_embedding"])
        for variable in model.trainable_variables:
            variable.assign(np.random.default_rng(1).normal(0, 0.1, variable.shape))
    if is_narrow:
        expected = VaultGemmaCausalLM(random_backbone(num_layers=1))
        expected.set_weights([to_numpy(v).astype("float32") for v in model.weights])
    check_equal(export(model, tmp_path, "onnx"), expected)


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("rounds", [True, False])
def test_int8(format, rounds, tmp_path):
    """One layer, in which few activations are so near a half that another engine rounds them to another number."""
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    config = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    model.quantize("int8", config=None if rounds else config)
    run, inputs = export(model, tmp_path, format), batch(model)
    difference = np.abs(run(inputs) - to_numpy(model(inputs)))[inputs["padding_mask"] > 0].max(-1)
    assert np.median(difference) < 1e-4 and difference.max() < (0.05 if rounds else 1e-4)
    data = tmp_path / ("model.onnx.data" if format == "onnx" else "model.bin")
    assert data.stat().st_size < 1.2 * model.backbone.count_params()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(format="litert"), "`format` must be one of .*'onnx', 'openvino'. Received: format='litert'"),
        (dict(format="onnx", input_signature=[1]), "`input_signature` must not be given for format='onnx'"),
        (dict(format="onnx", generate=True), "`generate` must not be given"),
        (dict(format="openvino", is_static=True), "`is_static` must not be given"),
        (dict(format="openvino"), "must end with '.xml' for format='openvino'. Received: filepath='m.onnx'"),
    ],
)  # fmt: skip
def test_what_is_rejected(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        VaultGemmaCausalLM(random_backbone(num_layers=1)).export("m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_models_that_are_rejected(tmp_path):
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    with pytest.raises(TypeError, match="export has no argument `opset`"):
        model.export(tmp_path / "m.onnx", format="onnx", opset=17)
    if BACKEND == "torch":
        with pytest.raises(ValueError, match="must be one of 'onnx', 'openvino'"):
            model.export(tmp_path / "model")
    else:
        with pytest.raises(ValueError, match="`generate` must be False"):
            model.export(tmp_path / "model", generate=True)
    model.quantize("int8")
    lora.add(model, rank=2)
    with pytest.raises(ValueError, match="must have no adapter.*attention/query with an adapter"):
        model.export(tmp_path / "m.onnx", format="onnx")
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    model.quantize("int4")
    with pytest.raises(ValueError, match="in floating point or int8. Received: .* in int4"):
        model.export(tmp_path / "m.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "tensorflow", reason="only its graphs can tokenize")
def test_strings_to_strings(tmp_path):
    import tensorflow as tf

    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    model.export(tmp_path / "model", verbose=False, generate=True)
    prompts = ["Once upon a time", "The fox said", "한국 <bos>", ""]
    exported = tf.saved_model.load(str(tmp_path / "model"))
    for inputs, count in ((prompts, 12), (prompts[:1], 1)):
        found = exported.generate(tf.constant(inputs), tf.constant(count)).numpy()
        assert [text.decode() for text in found] == model.generate(inputs, max_new_tokens=count)
