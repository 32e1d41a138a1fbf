"""`convert --to hf --as gemma`: a folder that transformers loads as Gemma 1, and this package too."""

import json
from shutil import copytree

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from common import random_backbone, to_numpy
from hard_texts import HARD

from keras_vaultgemma import VaultGemmaCausalLM, VaultGemmaTokenizer
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.config import read_config
from keras_vaultgemma.checkpoints.lazy_tensor import equal_bits
from keras_vaultgemma.checkpoints.reader import format_of, open_values
from keras_vaultgemma.checkpoints.tokenizer_json import read_tokenizer_json
from keras_vaultgemma.recipes.convert import convert
from keras_vaultgemma.recipes.describe import describe

pytestmark = pytest.mark.any_backend

TINY = presets.bundled()["vaultgemma_tiny"]
IDS = np.array([[2, *range(40, 55)]], "int32")


def our_logits(model):
    return to_numpy(model({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


def their_logits(model):
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bundled model as Gemma. No test may change it."""
    folder = tmp_path_factory.mktemp("exported") / "gemma"
    convert(TINY, folder, to="hf", dtype="float32", architecture="gemma", verify=True)
    return folder


def test_transformers_loads_gemma(tiny, exported):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(theirs) is transformers.GemmaForCausalLM
    assert theirs.generation_config.eos_token_id == [1, 107]
    assert np.abs(their_logits(theirs) - our_logits(tiny)).max() <= 1e-5
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma", ["GemmaForCausalLM"])
    # What older engines read.
    assert (config["torch_dtype"], config["rope_theta"]) == ("float32", 10000.0)
    assert config["hidden_activation"] == config["hidden_act"] == "gelu_pytorch_tanh"


def test_every_hyperparameter_of_gemma(tmp_path):
    backbone = random_backbone(
        num_key_value_heads=2,
        hidden_dim=50,  # which the config of VaultGemma cannot represent
        rope_theta=777.0,
        layer_norm_epsilon=1e-3,
    )
    backbone.save_to_preset(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "gemma", to="hf", architecture="gemma", shard_size=9999)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gemma")
    ours = VaultGemmaCausalLM(backbone)
    assert np.abs(their_logits(theirs) - our_logits(ours)).max() <= 1e-5
    assert read_config(tmp_path / "gemma") == read_config(tmp_path / "saved")


def test_it_comes_back(exported, tmp_path):
    assert format_of(exported) == "gemma" and "Hugging Face, as Gemma 1" in describe(exported)
    convert(exported, tmp_path / "keras", verify=True)
    (before, source), (after, back) = open_values(TINY), open_values(tmp_path / "keras")
    assert before == after
    for path, value in source.items():
        assert equal_bits(value.read("float32"), back[path].read("float32")), path
    convert(exported, tmp_path / "hf", to="hf", verify=True)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert type(theirs) is transformers.VaultGemmaConfig


def test_a_gemma_that_transformers_saved(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=8)
    config = transformers.GemmaConfig(**sizes, **heads, initializer_range=0.3)
    theirs = transformers.GemmaForCausalLM(config)
    for name, parameter in theirs.named_parameters():
        if "norm" in name:  # transformers starts them as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = VaultGemmaCausalLM.from_preset(tmp_path, preprocessor=None)
    assert np.abs(their_logits(theirs) - our_logits(ours)).max() <= 1e-5


def test_tokenizers_agree(exported):
    """Without SentencePiece (`tokenizers` alone) and with transformers."""
    ours = VaultGemmaTokenizer.from_preset(TINY)
    plain = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for text in HARD:
        if "<eos>" in text:  # a control piece for them, text for us
            continue
        ids = [2, *map(int, ours(text))]
        assert plain.encode(text).ids == ids, text
        assert theirs(text).input_ids == ids, text
    assert theirs.decode([106, 300, 107], skip_special_tokens=True) == ours.detokenize([300])
    assert theirs.chat_template
    pieces, _ = read_tokenizer_json(exported / "tokenizer.json")
    assert len(pieces) == 4096


def test_the_sources_own_tokenizer_files_are_kept(exported, tmp_path):
    folder = copytree(exported, tmp_path / "source")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"truncation": null', '"truncation":  null'))
    convert(folder, tmp_path / "new", to="hf", architecture="gemma")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes(), name
    path.unlink()
    convert(folder, tmp_path / "new", to="hf", architecture="gemma", overwrite=True)
    assert (tmp_path / "new/tokenizer.json").read_bytes() == (exported / path.name).read_bytes()
