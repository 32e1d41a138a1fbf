"""Exported folders in real transformers.js. Needs `npm install @huggingface/transformers`, see `tools/check_transformers_js.py`."""

import check_transformers_js
import numpy as np
import pytest

from keras_vaultgemma import VaultGemmaCausalLM, convert, lora

pytest.importorskip("onnx")
pytestmark = [
    pytest.mark.first_backend,
    pytest.mark.skipif(
        check_transformers_js.transformers_js() is None, reason="transformers.js is not installed"
    ),
]

CONTROL = "<bos> is text, <eos> too, <unk> and <pad>"
"""The hard text whose control tokens Hugging Face's tokenizers do not read as text."""


def test_transformers_js_generates_the_same(tiny, tmp_path):
    convert("vaultgemma_tiny", tmp_path / "new", to="transformers.js")
    others, tokens, difference, answer = check_transformers_js.compare(tiny, tmp_path / "new")
    assert (others, tokens) == ([CONTROL], [40, 40])
    assert difference <= 1e-4
    assert answer["batch"] == tiny.generate(check_transformers_js.PROMPTS, max_new_tokens=40)
    assert (answer["stops"], answer["dtype"]) == ([1, 107], "fp32")
    assert answer["chat"] == (
        "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_an_adapter_is_merged_and_quantized(tmp_path, dtype):
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.backbone.enable_lora(rank=4)
    random = np.random.default_rng(0)
    for variable in model.backbone.trainable_variables:
        variable.assign(random.normal(0, 0.1, variable.shape).astype("float32"))
    lora.save_adapter(model, tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "new", to="transformers.js", dtype=dtype)
    others, tokens, difference, answer = check_transformers_js.compare(model, tmp_path / "new")
    assert others == [CONTROL] and answer["dtype"] == dtype
    assert min(tokens) >= 3 and difference <= {"q8": 0.5, "q4": 3}[dtype]
