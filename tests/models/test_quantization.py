"""Quantization: its modes, its cost, and what the package's own calls warn of."""

import gc
import warnings
import weakref

import keras
import numpy as np
import pytest
from common import IDS, LINES, one_layer_preset, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, lora

pytestmark = pytest.mark.first_backend


def make_model():
    keras.utils.set_random_seed(0)
    return VaultGemmaCausalLM(random_backbone(num_layers=1))


def quantized_layers(model):
    return [layer.name for layer in model._flatten_layers() if layer.quantization_mode]


@pytest.mark.every_backend
def test_quantizing_collects_no_garbage_and_frees_the_matrices(monkeypatch):
    model = make_model()
    matrices = [v for v in model.weights if len(v.shape) == 2]
    references = [weakref.ref(v) for v in matrices]
    assert len(references) == 8
    del matrices
    calls = []
    monkeypatch.setattr(gc, "collect", lambda *args: calls.append(args))
    gc.disable()
    try:
        model.quantize("int8")
        assert [reference() for reference in references] == [None] * 8
    finally:
        gc.enable()
    assert calls == []


CONFIGS = {
    "int4": keras.quantizers.Int4QuantizationConfig(),
    "float8": keras.quantizers.Float8QuantizationConfig(),
    "gptq": keras.quantizers.GPTQConfig(dataset=["a"], tokenizer=None),
    "awq": keras.quantizers.AWQConfig(dataset=["a"], tokenizer=None),
}


@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize("part", ["model", "backbone"])
def test_other_modes_are_rejected_with_a_reason(model, mode, part):
    part = model if part == "model" else model.backbone
    with pytest.raises(ValueError, match=f"`mode` must be 'int8', because .*mode='{mode}'"):
        part.quantize(config=CONFIGS[mode])
    with pytest.raises(ValueError, match="mode|config"):
        part.quantize(mode)
    assert quantized_layers(model) == []


def test_filters_choose_layers():
    for filters, expected in (
        ("query|gate", ["query", "gate"]),
        (["query", "^up$"], ["query", "up"]),
        (lambda layer: layer.name == "down", ["down"]),
    ):
        model = make_model()
        model.quantize("int8", filters=filters)
        assert sorted(quantized_layers(model)) == sorted(expected)


def test_a_config_is_that_of_keras():
    model = make_model()
    config = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    model.quantize(config=config)
    gate = model.backbone.transformer_layers[0].gate
    assert gate.quantization_mode == "int8" and gate.inputs_quantizer is None


def test_the_packages_own_calls_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = VaultGemmaCausalLM.from_preset(one_layer_preset())
        model.quantize("int8")
        model.backbone.enable_lora(2)
        model.compile(keras.optimizers.Adam(1e-3))
        model.fit(LINES, batch_size=2, validation_data=LINES[:2], verbose=0)
        model.score(LINES)
        model.generate(LINES[:2], max_new_tokens=2)
        lora.save_adapter(model, tmp_path / "adapter")
        model.save_to_preset(tmp_path / "preset")
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        model.load_weights(tmp_path / "model.weights.h5")
        loaded = VaultGemmaCausalLM.from_preset(tmp_path / "preset")
        loaded.save_to_preset(tmp_path / "again")
        lora.merge(model)
    np.testing.assert_allclose(to_numpy(loaded(IDS)), to_numpy(model(IDS)), atol=1e-4)
