"""Exported GGUF files in real llama.cpp. Needs `npm install node-llama-cpp`, see `tools/check_llama_cpp.py`."""

import check_llama_cpp
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, convert, lora
from keras_vaultgemma.checkpoints.chat_template import CHAT_TEMPLATE

pytestmark = [
    pytest.mark.first_backend,
    pytest.mark.skipif(
        check_llama_cpp.node_llama_cpp() is None, reason="node-llama-cpp is not installed"
    ),
]


def test_llama_cpp_computes_the_same(tiny, tmp_path):
    convert("vaultgemma_tiny", tmp_path / "new", to="gguf")
    texts, tokens, difference, answer = check_llama_cpp.compare(tiny, tmp_path / "new/model.gguf")
    assert (texts, tokens) == (26, 40)
    assert difference <= 1e-3
    assert (answer["stops"], answer["begins"]) == ([1, 107], [2, True])
    assert answer["template"] == CHAT_TEMPLATE
    assert (
        answer["privacy"] == "The source states that it was not trained with differential privacy."
    )


def test_an_adapter_is_merged(tmp_path):
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    model.backbone.enable_lora(rank=4)
    random = np.random.default_rng(0)
    for variable in model.backbone.trainable_variables:
        variable.assign(random.normal(0, 0.1, variable.shape).astype("float32"))
    lora.save_adapter(model, tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "new", to="gguf")
    _, tokens, difference, answer = check_llama_cpp.compare(model, tmp_path / "new/model.gguf")
    assert tokens == 40 and difference <= 1e-3
    before = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    ids = np.array([[2, *map(int, model.preprocessor.tokenizer(check_llama_cpp.PROMPT))]], "int32")
    plain = before({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    change = check_llama_cpp.softmax(plain[0]) - np.array(answer["probabilities"])
    assert np.abs(to_numpy(change)).max() > 0.05
