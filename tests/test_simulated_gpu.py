"""On a GPU PyTorch does what it does on the CPU: no operation mixes tensors of both, and none reads the GPU's memory.

The GPU is simulated (`simulated_gpu`), because tests run on machines without one.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from common import one_layer_preset, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, backend, lora, privacy
from keras_vaultgemma.backend import blocks
from keras_vaultgemma.privacy.noise import add_noise

pytestmark = pytest.mark.skipif(backend.NAME != "torch", reason="PyTorch alone is simulated")

TEXTS = ["The tortoise won the race.", "The fox said no, and then yes."] * 4


def load(**options):
    keras.utils.set_random_seed(0)
    model = VaultGemmaCausalLM.from_preset(one_layer_preset(), **options)
    model.preprocessor.sequence_length = 12
    return model


def generated():
    model = load()
    texts = [*model.generate(["Once upon a time", "The fox"], max_new_tokens=5)]
    model.compile(sampler="top_p")
    texts.append(model.generate("The fox", max_new_tokens=5, seed=7, repetition_penalty=1.2))
    model.compile(sampler="beam")
    return [*texts, model.generate("The fox", max_new_tokens=3)]


def quantized():
    model = load()
    model.quantize("int8")
    return model.score("The fox said no.").tolist()


def trained():
    """Losses of LoRA with dropout in a bfloat16 base, and a text of the saved adapter."""
    model = load(dtype="bfloat16")
    model.backbone.enable_lora(2, dropout=0.1)
    model.compile(
        keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2), gradient_checkpointing=True
    )
    history = model.fit(TEXTS, batch_size=2, verbose=0, validation_data=TEXTS[:2]).history
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(model, f"{folder}/adapter")
        again = load(dtype="bfloat16")
        lora.load_adapter(again, f"{folder}/adapter")
    return [history["loss"], history["val_loss"], again.score("The fox said no.").tolist()]


def trained_wholly():
    """Losses of two steps of all weights, with a loss of logits."""
    model = load()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    return [model.fit(TEXTS, batch_size=4, verbose=0).history["loss"]]


def trained_privately():
    """Losses of two steps of LoRA. The noise of `secure` is the same on every device."""
    model = load()
    model.backbone.enable_lora(2, dropout=0.1)
    settings = privacy.DPSGD(noise_multiplier=1.0, delta=1e-3, seed_for_tests=3, secure=True)
    model.compile(keras.optimizers.SGD(0.1), privacy=settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = model.fit(TEXTS, batch_size=4, verbose=0).history
    return [history["unprotected_loss"], history["unprotected_clipped_share"]]


def noise():
    """Noise of the generator that only other devices than the CPU take, in two blocks there."""
    exact, size = backend.add_float64_noise, blocks.GPU_BLOCK
    backend.add_float64_noise, blocks.GPU_BLOCK = lambda *args: None, 150
    try:
        seed = keras.ops.convert_to_tensor(np.arange(4, dtype="int32"))
        return to_numpy(add_noise(keras.ops.zeros((20, 10)), None, 2.0, seed)).tolist()
    finally:
        backend.add_float64_noise, blocks.GPU_BLOCK = exact, size


def answers():
    return {
        "device": str(keras.ops.zeros(()).device),
        "generated": generated(),
        "quantized": quantized(),
        "trained": trained(),
        "trained wholly": trained_wholly(),
        "trained privately": trained_privately(),
        "noise": noise(),
    }


def test_it_computes_as_the_cpu_does(own_key):
    code = (
        "import simulated_gpu; simulated_gpu.start()\n"
        "import json, test_simulated_gpu as test\n"
        "print(json.dumps(test.answers()))"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    expected = answers()
    printed, _ = process.communicate(timeout=1000)
    assert process.returncode == 0
    found = json.loads(printed.splitlines()[-1])
    assert found.pop("device") == "cuda:0" and expected.pop("device") == "cpu"
    assert found.pop("generated") == expected.pop("generated")
    for name, numbers in expected.items():
        for ours, theirs in zip(found[name], numbers, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)
