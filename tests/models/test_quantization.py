"""Quantization: its modes, its cost, and what the package's own calls warn of."""

import gc
import warnings
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from common import IDS, LINES, one_layer_preset, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, lora, privacy

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
    "float8": keras.quantizers.Float8QuantizationConfig(),
    "gptq": keras.quantizers.GPTQConfig(dataset=["a"], tokenizer=None),
    "awq": keras.quantizers.AWQConfig(dataset=["a"], tokenizer=None),
}


@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize("part", ["model", "backbone"])
def test_other_modes_are_rejected_with_a_reason(model, mode, part):
    part = model if part == "model" else model.backbone
    with pytest.raises(
        ValueError, match=f"`mode` must be 'int8' or 'int4', because .*mode='{mode}'"
    ):
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


def test_int4_of_activations_is_rejected(model):
    quantizer = keras.quantizers.AbsMaxQuantizer(axis=-1)
    config = keras.quantizers.Int4QuantizationConfig(
        activation_quantizer=quantizer, block_size=None
    )
    with pytest.raises(ValueError, match="`config` must have activation_quantizer=None for int4"):
        model.quantize(config=config)
    assert quantized_layers(model) == []


SHORT = ["The hare had fallen asleep."] * 8


@pytest.mark.every_backend
def test_an_int4_model_learns_and_comes_back(tmp_path):
    """Scores, an adapter (plain and private), saved and loaded to equal logits, merged."""
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    expected = np.asarray(model.score(LINES[:2])).sum()
    model.quantize("int4")
    assert np.asarray(model.score(LINES[:2])).sum() == pytest.approx(expected, rel=0.05)
    ids = np.array([[2, *range(300, 312)]], "int32")
    log_p = to_numpy(keras.ops.log_softmax(model.score(ids, scoring_mode="logits"), axis=-1))
    scores = -np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(model.score(ids)[:, :-1], scores, rtol=1e-4, atol=1e-4)
    model.save_to_preset(tmp_path / "preset")

    model.backbone.enable_lora(2)
    model.compile(keras.optimizers.Adam(1e-2))
    losses = model.fit(SHORT, batch_size=8, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.3
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    tuned = to_numpy(model(inputs))
    lora.save_adapter(model, tmp_path / "adapter")
    loaded = VaultGemmaCausalLM.from_preset(tmp_path / "preset")
    assert loaded.backbone.transformer_layers[0].gate.quantization_mode == "int4"
    lora.load_adapter(loaded, tmp_path / "adapter")
    np.testing.assert_array_equal(to_numpy(loaded(inputs)), tuned)

    lora.merge(model)
    merged = np.abs(to_numpy(model(inputs)) - tuned).max()
    assert 0 < merged < 0.1 * np.abs(tuned).max()
    lora.unmerge(model)
    np.testing.assert_array_equal(to_numpy(model(inputs)), tuned)

    loaded.compile(
        keras.optimizers.Adam(1e-2),
        privacy=privacy.DPSGD(noise_multiplier=1.0, delta=1e-4, clip_norm=0.5),
    )
    loaded.fit(SHORT, batch_size=4, verbose=0)
    assert loaded.privacy.spent().steps == 2
    assert not np.array_equal(to_numpy(loaded(inputs)), tuned)


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


@pytest.mark.parametrize("mode", ["int8", None])
def test_random_samplers(mode):
    """The random state of a sampler is none of the model's variables, which quantization fixes."""
    model = make_model()
    if mode:
        model.quantize(mode)
    variables = [*model.variables]
    model.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, temperature=0.7))
    first, second = (model.generate([2, 17, 5], 5, None, seed=0) for _ in range(2))
    assert [*map(id, model.variables)] == [*map(id, variables)]
    assert len(first) == 5 and list(first) == list(second)
