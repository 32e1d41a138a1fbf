"""GGUF files, as the `gguf` package of llama.cpp's authors reads them. llama.cpp: `test_llama_cpp`."""

import json
import sys
import tracemalloc
from pathlib import Path
from shutil import copytree

import gguf
import numpy as np
import pytest
from common import float32_preset, random_backbone

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.checkpoints import lazy_tensor, presets
from keras_vaultgemma.checkpoints.chat_template import CHAT_TEMPLATE
from keras_vaultgemma.checkpoints.gguf_format import check_gguf
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.checkpoints.reader import open_values
from keras_vaultgemma.checkpoints.sentencepiece_format import Piece, read_pieces, with_pieces
from keras_vaultgemma.recipes.convert import convert

pytestmark = pytest.mark.any_backend

TINY = presets.bundled()["vaultgemma_tiny"]
VOCABULARY = "assets/tokenizer/vocabulary.spm"
BLOCK = {
    "attn_norm": "attention_norm/scale",
    "attn_q": "attention/query/weight",
    "attn_k": "attention/key/weight",
    "attn_v": "attention/value/weight",
    "attn_output": "attention/attention_output/weight",
    "ffn_norm": "mlp_norm/scale",
    "ffn_gate": "gate/weight",
    "ffn_up": "up/weight",
    "ffn_down": "down/weight",
}
NAMES = {
    "token_embd": "token_embedding/embeddings",
    "output_norm": "final_norm/scale",
    **{f"blk.{i}.{a}": f"decoder_block_{i}/{b}" for i in range(4) for a, b in BLOCK.items()},
}
"""llama.cpp's names of the tensors of "gemma", and this package's."""


def read(folder):
    return gguf.GGUFReader(folder / "model.gguf")


def field(reader, name):
    return reader.fields[name].contents() if name in reader.fields else None


def write_preset(tiny, folder, **changes):
    sizes = dict(hidden_dim=64, head_dim=16, intermediate_dim=96, num_layers=1)
    backbone = random_backbone(**{"vocabulary_size": 4096, **sizes, **changes})
    VaultGemmaCausalLM(backbone, tiny.preprocessor).save_to_preset(folder)
    return backbone


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_every_tensor(tmp_path, dtype):
    source = Path(float32_preset())
    metadata = convert(source, tmp_path / "new", to="gguf", dtype=dtype, verify=True)
    long = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(dtype, dtype)
    assert metadata["dtype"] == long
    tensors = {t.name.removesuffix(".weight"): t for t in read(tmp_path / "new").tensors}
    assert tensors.keys() == NAMES.keys()
    _, values = open_values(source)
    for name, tensor in tensors.items():
        value = values[NAMES[name]].read("float32")
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("norm"):
            assert tensor.tensor_type.name == "F32"
            assert np.array_equal(found, 1 + value)
        elif dtype == "q8_0":
            assert tensor.tensor_type.name == "Q8_0"
            blocks = value.reshape(-1, 32)
            error = np.abs(found.reshape(-1, 32) - blocks).max(1)
            assert (
                error <= np.abs(blocks).max(1) / 127 * (0.5 + 127 / 2**11)
            ).all()  # the scale is float16
        else:
            assert tensor.tensor_type.name == dtype.upper()
            assert np.array_equal(found, value.astype(DTYPES[long]).astype("float32"))


def test_hyperparameters_and_vocabulary(tiny, tmp_path):
    backbone = write_preset(
        tiny,
        tmp_path / "saved",
        vocabulary_size=4100,
        num_key_value_heads=2,
        rope_theta=777.0,
        layer_norm_epsilon=1e-5,
    )
    convert(tmp_path / "saved", tmp_path / "new", to="gguf")
    reader = read(tmp_path / "new")
    expected = {
        "general.architecture": "gemma",
        "gemma.block_count": 1,
        "gemma.context_length": backbone.max_sequence_length,
        "gemma.embedding_length": 64,
        "gemma.feed_forward_length": 96,
        "gemma.attention.head_count": 4,
        "gemma.attention.head_count_kv": 2,
        "gemma.attention.key_length": 16,
        "gemma.attention.value_length": 16,
        "gemma.rope.freq_base": 777.0,
        "gemma.vocab_size": 4100,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 107,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {name: field(reader, name) for name in expected} == expected
    assert field(reader, "gemma.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    pieces = read_pieces((TINY / VOCABULARY).read_bytes())
    columns = [
        field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    ]
    assert list(zip(*columns, strict=True))[:4096] == pieces
    assert columns[0][4096:] == [
        f"<unused {i}>" for i in range(4096, 4100)
    ]  # as long as the embedding
    assert columns[2][4096:] == [5] * 4


def test_statements(tmp_path):
    folder = copytree(TINY, tmp_path / "source")
    stated = json.loads((folder / "metadata.json").read_text())
    stated["privacy"] = {"epsilon": 2.0, "unit": "one sequence"}
    (folder / "metadata.json").write_text(json.dumps(stated))
    metadata = convert(folder, tmp_path / "new", to="gguf")
    files = {"README.md", "metadata.json", "model.gguf", "Modelfile"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == files
    assert {*metadata["files"], "metadata.json"} == files
    reader = read(tmp_path / "new")
    assert field(reader, "general.name") == "source"
    assert field(reader, "general.license") == "Apache-2.0"
    assert field(reader, "general.description") == stated["description"]
    assert (
        field(reader, "keras_vaultgemma.privacy") == "- ε: 2.0\n- unit of protection: one sequence"
    )
    embedded = json.loads(field(reader, "keras_vaultgemma.metadata"))
    assert embedded == {name: metadata[name] for name in embedded}
    assert embedded["source"]["files"].keys() >= {"model.weights.h5", VOCABULARY}
    card = (tmp_path / "new/README.md").read_text()
    assert "tags: [vaultgemma, differential-privacy, gguf]" in card and "llama-cli" in card


def test_the_modelfile_has_the_chat_template(tmp_path):
    convert(TINY, tmp_path / "new", to="gguf")
    text = (tmp_path / "new/Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert "PARAMETER stop <end_of_turn>\n" in text and "PARAMETER num_ctx 512\n" in text
    folder = copytree(TINY, tmp_path / "source")
    turns = {106: Piece("<unused106>", kind=4), 107: Piece("<unused107>", kind=4)}
    path = folder / VOCABULARY
    path.write_bytes(with_pieces(path.read_bytes(), turns))
    convert(folder, tmp_path / "new", to="gguf", overwrite=True)
    assert "TEMPLATE {{ .Prompt }}\n" in (tmp_path / "new/Modelfile").read_text()
    reader = read(tmp_path / "new")
    assert field(reader, "tokenizer.chat_template") is None
    assert field(reader, "tokenizer.ggml.eot_token_id") is None


def test_the_sources_own_chat_template_is_kept(tmp_path):
    convert(TINY, tmp_path / "hf", to="hf")
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    convert(tmp_path / "hf", tmp_path / "new", to="gguf")
    assert (
        field(read(tmp_path / "new"), "tokenizer.chat_template") == "{{ messages[0]['content'] }}!"
    )
    assert "TEMPLATE" not in (tmp_path / "new/Modelfile").read_text()


OTHER = [
    (
        dict(attention_logit_soft_cap=50.0),
        "`attention_logit_soft_cap` must be None, because Gemma 1",
    ),
    (dict(final_logit_soft_cap=30.0), "`final_logit_soft_cap` must be None, because Gemma 1"),
    (dict(query_pre_attn_scalar=8), "`query_pre_attn_scalar` must be head_dim=16, because Gemma 1"),
    (
        dict(layer_types=["sliding_attention"], sliding_window_size=8),
        "`layer_types` must be 'full_attention' for every layer, because Gemma 1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), OTHER)
@pytest.mark.parametrize("options", [dict(to="gguf"), dict(to="hf", architecture="gemma")])
def test_what_gemma_1_does_not_have_is_rejected_by_name(tiny, tmp_path, changes, message, options):
    write_preset(tiny, tmp_path / "saved", **changes)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "saved", tmp_path / "new", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_rows_that_are_no_whole_blocks_are_rejected_by_name(tiny, tmp_path):
    write_preset(tiny, tmp_path / "saved", intermediate_dim=40)
    message = (
        "the rows of decoder_block_0/down/weight must be a multiple of 32. Received: rows of 40"
    )
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "saved", tmp_path / "new", to="gguf", dtype="q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    convert(tmp_path / "saved", tmp_path / "new", to="gguf", dtype="f16", verify=True)


def test_a_model_without_vocabulary_raises(tmp_path):
    random_backbone(num_layers=1).save_to_preset(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved must have a vocabulary .* a GGUF file holds one"):
        convert(tmp_path / "saved", tmp_path / "new", to="gguf")
    assert not (tmp_path / "new").exists()


def test_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "keras-vaultgemma\[gguf\]"'):
        convert(TINY, tmp_path / "new", to="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["blk.2.ffn_up", "output_norm"])
def test_one_bit_is_found(tmp_path, name):
    convert(TINY, tmp_path / "new", to="gguf", dtype="f32")
    path = tmp_path / "new/model.gguf"
    tensor = next(t for t in read(tmp_path / "new").tensors if t.name == f"{name}.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset + tensor.n_bytes - 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.weight must have the same bits"):
        check_gguf(path, *open_values(TINY), "float32", lambda count: None)


def test_no_more_than_a_block_is_in_memory(tiny, tmp_path, monkeypatch):
    """Of a model of 12 MB. Converted once before, so that imports are not measured."""
    sizes = dict(hidden_dim=256, head_dim=64, intermediate_dim=2048)
    backbone = write_preset(tiny, tmp_path / "saved", **sizes)
    peaks = []
    for size in (lazy_tensor.BLOCK_BYTES, 2**18):
        monkeypatch.setattr(lazy_tensor, "BLOCK_BYTES", size)
        tracemalloc.start()
        convert(tmp_path / "saved", tmp_path / "new", to="gguf", dtype="q8_0", overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 4 * backbone.count_params() > 11e6 and peaks[1] < 5e6


def test_a_folder_with_a_gguf_file_is_overwritten(tmp_path):
    new = tmp_path / "new"
    convert(TINY, new, to="gguf")
    convert(TINY, new, to="hf", overwrite=True)
    assert not (new / "model.gguf").exists() and not (new / "Modelfile").exists()
    convert(TINY, new, to="gguf", overwrite=True)
    assert {p.name for p in new.iterdir()} == {
        "README.md",
        "metadata.json",
        "model.gguf",
        "Modelfile",
    }


def test_loading_one_says_what_to_use(tmp_path):
    convert(TINY, tmp_path / "new", to="gguf")
    with pytest.raises(ValueError, match="model.gguf, in llama.cpp's format: use the safetensors"):
        VaultGemmaCausalLM.from_preset(tmp_path / "new")
