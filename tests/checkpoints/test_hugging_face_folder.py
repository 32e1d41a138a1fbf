"""Folders for transformers that are written without a model: what transformers reads from them."""

import json

import pytest
import transformers
from common import RELEASE_LIKE

from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.hugging_face_folder import (
    write_hugging_face_config,
)
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES

HYPERPARAMETERS = {
    **RELEASE_LIKE,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 13,
    "attention_logit_soft_cap": 20,
    "final_logit_soft_cap": 10.5,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window_size": 7,
    "rope_theta": 777,
    "layer_norm_epsilon": 1e-5,
}
TEXTS = [
    "Once upon a time",
    " a  b   c    d\n\n\n\tx",
    "It's 12,345.67 — naïve, 한국 𒀀𒁀 e\u0301",
    "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n",
    "<table><tr></b> <unused7> x<i>y",
    "",
]


@pytest.mark.any_backend
def test_transformers_reads_every_hyperparameter(tmp_path):
    write_hugging_face_config(tmp_path, HYPERPARAMETERS, DTYPES["bfloat16"], None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json"}
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.VaultGemmaConfig
    assert theirs.architectures == ["VaultGemmaForCausalLM"]
    assert str(theirs.dtype).endswith("bfloat16") and theirs.tie_word_embeddings
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)
    assert (theirs.attn_logit_softcapping, theirs.final_logit_softcapping) == (20.0, 10.5)
    assert theirs.layer_types == HYPERPARAMETERS["layer_types"]
    assert (theirs.query_pre_attn_scalar, theirs.sliding_window) == (13, 7)
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 777.0}
    assert read_config(tmp_path) == HYPERPARAMETERS
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 1, 0)


@pytest.mark.any_backend
def test_every_field_of_a_saved_config_is_written(tmp_path):
    """No field takes its default from transformers, because that is Gemma 2's."""
    write_hugging_face_config(tmp_path, HYPERPARAMETERS, DTYPES["float32"], None, None)
    written = json.loads((tmp_path / "config.json").read_text())
    transformers.VaultGemmaConfig(dtype="float32").save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs/config.json").read_text())
    assert theirs.keys() - written.keys() <= {"transformers_version"}


@pytest.mark.any_backend
def test_an_unused_window_is_not_null(tmp_path):
    """transformers fails on a null window even if no layer slides."""
    unused = {"layer_types": ["full_attention"] * 3, "sliding_window_size": None}
    write_hugging_face_config(
        tmp_path, {**HYPERPARAMETERS, **unused}, DTYPES["float32"], None, None
    )
    assert read_config(tmp_path)["sliding_window_size"] == 4096


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query_pre_attn_scalar": 7.5},
            "`query_pre_attn_scalar` must be an integer for transformers. Received: query_pre_attn_scalar=7.5",
        ),
        (
            {"hidden_dim": 50},
            "`hidden_dim` must be a multiple of num_query_heads=4 for transformers. Received: hidden_dim=50",
        ),
    ],
)
def test_hyperparameters_that_transformers_cannot_represent(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_hugging_face_config(
            tmp_path, {**HYPERPARAMETERS, **change}, DTYPES["float32"], None, None
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.any_backend
def test_tokenizers_agree(tiny, tmp_path):
    vocabulary = presets.file(presets.bundled()["vaultgemma_tiny"], "vocabulary")
    write_hugging_face_config(
        tmp_path, HYPERPARAMETERS, DTYPES["float32"], tiny.preprocessor, vocabulary
    )
    assert (tmp_path / "tokenizer.model").read_bytes() == vocabulary.read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == HYPERPARAMETERS["max_sequence_length"]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (
        2,
        1,
        0,
        4096,
    )
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == [2, *tiny.preprocessor.tokenizer.tokenize([text])[0]], text
        assert theirs.decode(ids[1:]) == text
