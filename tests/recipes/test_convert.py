"""Conversion of whole checkpoints: round trips, agreement with other libraries, and failures."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from shutil import copytree

import huggingface_hub
import keras
import keras_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from common import random_backbone, to_numpy
from hub_stub import HubStub
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from keras_vaultgemma import (
    VaultGemmaBackbone,
    VaultGemmaCausalLM,
    VaultGemmaTokenizer,
    apply_chat_template,
)
from keras_vaultgemma._files import new_folder
from keras_vaultgemma.checkpoints import lazy_tensor, presets
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, equal_bits
from keras_vaultgemma.checkpoints.reader import open_values
from keras_vaultgemma.checkpoints.safetensors_format import open_tensors
from keras_vaultgemma.checkpoints.sentencepiece_format import Piece, with_pieces
from keras_vaultgemma.recipes import convert as convert_module
from keras_vaultgemma.recipes import verification
from keras_vaultgemma.recipes.convert import _parse_size, convert

pytestmark = pytest.mark.any_backend

ROOT = Path(__file__).parents[2]
TINY = ROOT / "presets/vaultgemma_tiny"
VOCABULARY = TINY / "assets/tokenizer/vocabulary.spm"
IDS = np.array([[2, *range(300, 315)]], "int32")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Return a bfloat16 model of transformers with all its features, and its folder."""
    torch.manual_seed(0)
    config = transformers.VaultGemmaConfig(
        vocab_size=4096,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=7,
        sliding_window=5,
        max_position_embeddings=64,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # transformers starts them as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(VOCABULARY.read_bytes())
    return model, folder


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def logits(model, ids=IDS):
    return to_numpy(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))


def their_logits(folder, ids=IDS):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(ids).long()).logits.numpy()


def test_there_and_back_is_bit_equal(theirs, tmp_path):
    convert(theirs[1], tmp_path / "keras")
    metadata = convert(tmp_path / "keras", tmp_path / "hf", to="hf", shard_size=20_000)
    assert metadata["dtype"] == "bfloat16"
    source, back = open_tensors(theirs[1]), open_tensors(tmp_path / "hf")
    assert source.keys() == back.keys() and len(source) == 29
    assert all(tensor.dtype == DTYPES["bfloat16"] for tensor in source.values())
    assert [name for name in source if not equal_bits(source[name], back[name])] == []
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    ignored = {"transformers_version", "_name_or_path"}
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (theirs[1], tmp_path / "hf")
    ]
    assert {k: v for k, v in configs[0].items() if k not in ignored} == configs[1]


def test_hugging_face_to_keras_has_equal_logits(theirs, tmp_path):
    folder = theirs[1]
    convert(folder, tmp_path / "keras", dtype="float32", verify=True)
    for load in (VaultGemmaCausalLM.from_preset, keras_hub.models.CausalLM.from_preset):
        ours = load(str(tmp_path / "keras"))
        expected = their_logits(folder)
        assert np.abs(logits(ours) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert expected.std() > 0.5
    pieces = SentencePieceProcessor(model_file=str(VOCABULARY)).encode("Once upon a time")
    assert ours.preprocessor.tokenizer("Once upon a time").tolist() == pieces


def test_transformers_generates_the_same_text(tiny, tmp_path):
    convert("vaultgemma_tiny", tmp_path / "hf", to="hf", dtype="float32", verify=True)
    assert names(tmp_path / "hf") == {
        "README.md",
        "config.json",
        "generation_config.json",
        "metadata.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model) is transformers.VaultGemmaForCausalLM and model.dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = "Once upon a time there was"
    inputs = tokenizer(prompt, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == [2, *tiny.preprocessor.tokenizer(prompt).tolist()]
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == tiny.generate(
        prompt, max_new_tokens=20
    )


def test_keras_hub_to_both(tmp_path):
    """keras-hub's Gemma has the same logits in this package and in transformers."""
    tokenizer = keras_hub.models.GemmaTokenizer(proto=str(VOCABULARY))
    sizes = dict(num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=24, head_dim=10)
    hub = keras_hub.models.GemmaBackbone(
        4096, intermediate_dim=80, final_logit_soft_cap=2.0, **sizes
    )
    random = np.random.default_rng(0)
    for variable in hub.variables:
        variable.assign(random.normal(0, 0.3, variable.shape).astype("float32"))
    task = keras_hub.models.GemmaCausalLM(
        hub, keras_hub.models.GemmaCausalLMPreprocessor(tokenizer)
    )
    task.save_to_preset(tmp_path / "hub")
    hidden = hub({"token_ids": IDS, "padding_mask": np.ones_like(IDS)})
    expected = to_numpy(hub.token_embedding(hidden, reverse=True))
    assert np.abs(expected).max() > 1.9  # near its cap of 2
    convert(tmp_path / "hub", tmp_path / "keras", verify=True)
    convert(tmp_path / "hub", tmp_path / "hf", to="hf", verify=True)
    assert (
        np.abs(logits(VaultGemmaCausalLM.from_preset(tmp_path / "keras")) - expected).max() <= 1e-5
    )
    assert np.abs(their_logits(tmp_path / "hf") - expected).max() <= 1e-5


def test_adapters_are_exported_merged(tmp_path):
    backbone = random_backbone(num_layers=3)
    backbone.enable_lora(3)
    layers = [
        getattr(block.attention, name)
        for block in backbone.transformer_layers
        for name in ("query", "value")
    ]
    random = np.random.default_rng(0)
    expected = {
        variable.path: to_numpy(variable.value)
        for variable in backbone.variables
        if "lora" not in variable.path
    }
    for layer in layers:
        a, b = (
            random.normal(0, 0.3, v.shape).astype("float32")
            for v in (layer.lora_kernel_a, layer.lora_kernel_b)
        )
        layer.lora_alpha = 6  # twice the rank
        layer.lora_kernel_a.assign(a)
        layer.lora_kernel_b.assign(b)
        expected[f"{layer.path}/weight"] = expected[f"{layer.path}/weight"] + 6 / 3 * (a @ b).T
    model = VaultGemmaCausalLM(backbone)
    model.save_to_preset(tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "hf", to="hf")
    _, values = open_values(tmp_path / "hf")
    assert values.keys() == expected.keys()
    for path, value in values.items():
        assert np.abs(value.read() - expected[path]).max() <= 1e-6, path
    ids = np.array([[2, 5, 77, 9, 100]], "int32")
    assert np.abs(their_logits(tmp_path / "hf", ids) - logits(model, ids)).max() <= 1e-4


def test_float32_adapters_over_a_bfloat16_base_are_rounded_once(tmp_path):
    backbone = random_backbone(num_layers=3, dtype="bfloat16")
    backbone.enable_lora(3)
    query = backbone.transformer_layers[1].attention.query
    random = np.random.default_rng(0)
    factors = [
        random.normal(0, 0.3, v.shape).astype("float32")
        for v in (query.lora_kernel_a, query.lora_kernel_b)
    ]
    weight = to_numpy(query.weight.value).astype("float32")
    query.lora_kernel_a.assign(factors[0])
    query.lora_kernel_b.assign(factors[1])
    backbone.save_to_preset(tmp_path / "tuned")
    assert (
        convert(tmp_path / "tuned", tmp_path / "hf", to="hf", dtype="bfloat16")["dtype"]
        == "bfloat16"
    )
    _, values = open_values(tmp_path / "hf")
    merged = weight + (factors[0] @ factors[1]).T
    error = np.abs(values[f"{query.path}/weight"].read("float32") - merged)
    assert (error <= 2**-8 * np.abs(merged) + 1e-6).all()  # half of bfloat16's last bit


@pytest.mark.parametrize("to", ["keras", "hf"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(tmp_path, to, dtype):
    convert(TINY, tmp_path / "new", to=to, dtype=dtype)
    _, source = open_values(TINY)
    _, written = open_values(tmp_path / "new")
    for path, value in written.items():
        assert equal_bits(value.read(), source[path].read(dtype)), path


def test_several_dtypes_become_float32(theirs, tmp_path):
    state = {name: t.float() if "norm" in name else t for name, t in theirs[0].state_dict().items()}
    theirs[0].save_pretrained(tmp_path / "mixed", state_dict=dict(state))
    assert convert(tmp_path / "mixed", tmp_path / "new", to="hf")["dtype"] == "float32"
    written = safetensors.torch.load_file(tmp_path / "new/model.safetensors")
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in written.items())


def test_metadata_and_card(tmp_path):
    metadata = convert(TINY, tmp_path / "new", dtype="float16")
    assert metadata == json.loads((tmp_path / "new/metadata.json").read_text())
    assert (
        metadata["parameter_count"]
        == VaultGemmaBackbone.from_preset(tmp_path / "new").count_params()
    )
    assert (metadata["dtype"], metadata["license"], metadata["privacy"]) == (
        "float16",
        "Apache-2.0",
        None,
    )
    stated = json.loads((TINY / "metadata.json").read_text())
    assert metadata["corpus"] == stated["corpus"]
    assert (metadata["source"]["name"], metadata["source"]["revision"]) == ("vaultgemma_tiny", None)
    for folder, files in (
        (TINY, metadata["source"]["files"]),
        (tmp_path / "new", metadata["files"]),
    ):
        assert {*files, "metadata.json"} == names(folder)
        for name, digest in files.items():
            assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    card = (tmp_path / "new/README.md").read_text()
    assert stated["description"] in card and "Apache-2.0" in card
    assert "was not trained with differential privacy" in card


def test_keras_hub_uploads_the_preset(tmp_path, monkeypatch):
    convert(TINY, tmp_path / "new")
    before, uploaded = names(tmp_path / "new"), {}
    monkeypatch.setattr(
        huggingface_hub,
        "create_repo",
        lambda repo_id, exist_ok: huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}"),
    )
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repo_id, filename: True)
    monkeypatch.setattr(
        huggingface_hub,
        "upload_folder",
        lambda repo_id, folder_path: uploaded.update({repo_id: names(Path(folder_path))}),
    )
    keras_hub.upload_preset("hf://me/mine", str(tmp_path / "new"))
    assert uploaded == {"me/mine": before}
    assert {"README.md", "config.json", "model.weights.h5", "task.json", "metadata.json"} <= before


def test_a_model_without_vocabulary(theirs, tmp_path):
    theirs[0].save_pretrained(tmp_path / "source")
    with pytest.warns(UserWarning, match="source has no vocabulary .*works on token ids only"):
        convert(tmp_path / "source", tmp_path / "keras")
    assert names(tmp_path / "keras") == {
        "README.md",
        "config.json",
        "task.json",
        "metadata.json",
        "model.weights.h5",
    }
    ours = VaultGemmaCausalLM.from_preset(tmp_path / "keras", preprocessor=None)
    assert ours.backbone.num_query_heads == 6
    with pytest.warns(UserWarning, match="keras has no vocabulary"):
        convert(tmp_path / "keras", tmp_path / "hf", to="hf")
    assert not list((tmp_path / "hf").glob("tokenizer*"))


def test_a_handle_is_recorded_with_its_commit(theirs, tmp_path):
    """Another model under the name of Google's repository gets no privacy statement."""
    code = (
        "import json; from keras_vaultgemma import convert; "
        "print(json.dumps(convert('hf://google/vaultgemma-1b@main', 'new')))"
    )
    with HubStub({"google/vaultgemma-1b": {"main": theirs[1]}}) as hub:
        env = {**hub.environment(tmp_path), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        metadata = json.loads(done.stdout)
        assert metadata["source"]["revision"] == hub.commit("google/vaultgemma-1b")
    assert metadata["source"]["name"] == "hf://google/vaultgemma-1b@main"
    assert {*metadata["source"]["files"]} == names(theirs[1])
    assert "privacy" not in metadata
    assert VaultGemmaCausalLM.from_preset(tmp_path / "new").backbone.num_layers == 3


# Errors, and what a failure leaves.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(to="pt"), "`to` must be one of 'keras', 'hf', 'gguf', .* Received: to='pt'"),
        (
            dict(dtype="int8"),
            "`dtype` must be None or one of 'float32', 'float16', 'bfloat16'. Received: dtype='int8'",
        ),
        (dict(to="hf", dtype="q8_0"), '`dtype` must be a floating-point type unless to="gguf"'),
        (
            dict(to="hf", architecture="gemma2"),
            "`architecture` must be one of 'vaultgemma', 'gemma'",
        ),
        (dict(architecture="gemma"), "`architecture` must be 'vaultgemma' unless to='hf'"),
        (
            dict(shard_size="5GB"),
            "`shard_size` must be None unless to='hf', because .* Received: shard_size='5GB'",
        ),
        (
            dict(to="hf", shard_size="5 elephants"),
            "`shard_size` must be a positive number of bytes, such as 5000000 or '5GB'",
        ),
        (
            dict(to="hf", shard_size=0),
            "`shard_size` must be a positive number of bytes.*Received: shard_size=0",
        ),
        (dict(to="hf", shard_size=-5), "`shard_size` must be a positive number of bytes"),
        (dict(to="hf", shard_size=True), "`shard_size` must be a positive number of bytes"),
        (dict(to="hf", shard_size=1.5), "`shard_size` must be a positive number of bytes"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(TINY, tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("7", 7), ("20KB", 20_000), ("3 mb", 3_000_000), ("5GB", 5_000_000_000)],
)
def test_shard_sizes(size, count):
    assert _parse_size(size) == count


def test_an_existing_target_raises(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(
        FileExistsError, match=r"new exists. Pass `overwrite=True` \(--overwrite\) to replace"
    ):
        convert(TINY, tmp_path / "new")
    convert(TINY, tmp_path / "new", overwrite=True)
    with pytest.raises(ValueError, match="`target` must be another folder than the source"):
        convert(tmp_path / "new", tmp_path / "new", to="hf", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError,
        match="other has no config.json, so it holds no model and is not overwritten",
    ):
        convert(TINY, tmp_path / "other", overwrite=True)
    assert names(tmp_path / "other") == {"thesis.tex"}


def test_overwriting_removes_the_old_model(tmp_path):
    new = tmp_path / "new"
    convert(TINY, new, to="hf", shard_size="2MB")
    (new / "notes.txt").write_text("mine")
    convert(TINY, new, overwrite=True)
    assert names(new) == names(TINY) | {"notes.txt"}
    convert(TINY, new, to="hf", overwrite=True)
    assert (
        open_tensors(new).keys()
        and "model.weights.h5" not in names(new)
        and "notes.txt" in names(new)
    )


def test_overwriting_leaves_the_users_files(tmp_path):
    """Only what an earlier conversion lists is deleted."""
    new = tmp_path / "new"
    convert(TINY, new, to="hf", shard_size="2MB")
    mine = {"run.json", "my_notes.json", "other.safetensors", "old.h5", "sub/model.safetensors"}
    for name in mine:
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_text("mine")
    convert(TINY, new, overwrite=True)
    convert(TINY, new, to="hf", overwrite=True)
    convert(TINY, new, overwrite=True)
    assert names(new) == names(TINY) | mine
    assert {(new / name).read_text() for name in mine} == {"mine"}


@pytest.mark.parametrize("listed", [["../secret.json"], {"../secret.json": ""}, {"/etc/x": ""}, 3])
def test_a_list_of_files_elsewhere_deletes_nothing(tmp_path, listed):
    (tmp_path / "secret.json").touch()
    convert(TINY, tmp_path / "new")
    path = tmp_path / "new/metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": listed}))
    convert(TINY, tmp_path / "new", overwrite=True)
    assert (tmp_path / "secret.json").exists()


def test_files_that_would_join_the_new_model_raise(tiny, tmp_path):
    """Those of a model that no conversion wrote, which is neither deleted nor mixed."""
    tiny.save_to_preset(tmp_path / "saved")
    before = names(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved has .*tokenizer.json.* a part of the new model"):
        convert(TINY, tmp_path / "saved", to="hf", overwrite=True)
    assert names(tmp_path / "saved") == before
    convert(TINY, tmp_path / "saved", overwrite=True)
    assert names(tmp_path / "saved") == before | {"README.md"}


def test_one_conversion_at_a_time_writes_to_a_target(tmp_path):
    with new_folder(tmp_path / "new", exclusive=True):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="new is being written by another process"):
                convert(TINY, tmp_path / "new", overwrite=overwrite)
        convert(TINY, tmp_path / "other")
    convert(TINY, tmp_path / "third")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "other", "third"}


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(
        convert_module,
        "_open_vocabulary",
        lambda *_: (tmp_path / "new").mkdir(),
    )
    with pytest.raises(FileExistsError, match="new exists"):
        convert(TINY, tmp_path / "new")


# Text: chat templates, stop ids and tokenizers


CHAT = [
    {"role": "user", "content": " Hello "},
    {"role": "assistant", "content": "Hi!\n"},
    {"role": "user", "content": "A\nstory?"},
]


def test_an_exported_model_can_chat(tmp_path):
    convert(TINY, tmp_path / "hf", to="hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for chat, prompt in ((CHAT[:2], False), (CHAT, True)):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert text == "<bos>" + apply_chat_template(chat, add_generation_prompt=prompt)
    found = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    ours = VaultGemmaTokenizer.from_preset(TINY)
    prompt = apply_chat_template(CHAT, add_generation_prompt=True)
    assert found["input_ids"] == [2, *map(int, ours(prompt))]
    for chat in ([{"role": "system", "content": "x"}], [CHAT[0], CHAT[0]]):
        with pytest.raises(Exception, match="alternate"):
            tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode([106, 300, 107], skip_special_tokens=True) == ours.detokenize([300])
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == [1, 107]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == [1, 107]


def test_a_vocabulary_without_turns_gets_no_template(tmp_path):
    folder = copytree(TINY, tmp_path / "source")
    path = folder / "assets/tokenizer/vocabulary.spm"
    turns = {106: Piece("<unused106>", kind=4), 107: Piece("<unused107>", kind=4)}
    path.write_bytes(with_pieces(path.read_bytes(), turns))
    convert(folder, tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert "chat_template" not in config
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 1


def test_hugging_face_to_hugging_face_keeps_what_is_about_text(theirs, tmp_path):
    folder = copytree(theirs[1], tmp_path / "source")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5], "top_k": 7}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("tools")
    edit = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**edit, "eos_token_id": [1, 5]}))
    metadata = convert(folder, tmp_path / "hf", to="hf", dtype="float32")
    kept = names(folder) - {"config.json", "model.safetensors"}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= kept
    assert {"additional_chat_templates/tools.jinja"} <= kept == kept & {*metadata["files"]}
    for name in kept:
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == [1, 5]
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to(TINY / "README.md")
    with pytest.raises(ValueError, match="must not be a link that leaves its folder"):
        convert(folder, tmp_path / "other", to="hf")


def test_a_folder_with_tokenizer_json_alone(theirs, tmp_path):
    """As every trainer of transformers 5 saves it."""
    folder = copytree(theirs[1], tmp_path / "source")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    convert(folder, tmp_path / "keras")
    ours = VaultGemmaCausalLM.from_preset(tmp_path / "keras").preprocessor.tokenizer
    hub = keras_hub.models.CausalLM.from_preset(str(tmp_path / "keras")).preprocessor.tokenizer
    text = "Once  upon\n\n a time<end_of_turn>"
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert ours(text).tolist() == hub(text).tolist() == expected


def test_a_malformed_source_leaves_no_target(theirs, tmp_path):
    theirs[0].save_pretrained(tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        convert(tmp_path / "source", tmp_path / "new")
    assert names(tmp_path) == {f"source/{name}" for name in names(tmp_path / "source")}


def test_values_beyond_the_dtype_leave_no_target(theirs, tmp_path):
    theirs[0].save_pretrained(
        tmp_path / "source", state_dict={n: t * 1e6 for n, t in theirs[0].state_dict().items()}
    )
    with pytest.raises(ValueError, match="must be from -65504 to 65504 for float16. Received: ±"):
        convert(tmp_path / "source", tmp_path / "new", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantized_preset_raises(tmp_path):
    backbone = random_backbone(num_layers=1)
    backbone.quantize("int8")
    backbone.save_to_preset(tmp_path / "int8")
    with pytest.raises(
        ValueError,
        match="int8 cannot be converted: .*A quantized preset no longer has the exact weights",
    ):
        convert(tmp_path / "int8", tmp_path / "new", to="hf")
    assert not (tmp_path / "new").exists()


def test_a_difference_fails_the_conversion(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "_transformers_logits", lambda *_: np.ones(1))
    monkeypatch.setattr(verification, "_keras_logits", lambda *_: np.zeros(1))
    with pytest.raises(
        ValueError,
        match="The logits of source and target must differ by at most 0.001. Received: 1",
    ):
        convert(TINY, tmp_path / "new", to="hf", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "to"), [("hf", "keras"), ("keras", "hf"), ("keras_hub", "keras")]
)
def test_no_more_than_a_block_is_in_memory(tmp_path, monkeypatch, source, to):
    """Of a model of 10 MB. Converted once before, so that imports are not measured."""
    sizes = dict(
        num_layers=2, num_query_heads=4, num_key_value_heads=4, hidden_dim=256, head_dim=64
    )
    if source == "keras_hub":
        model = keras_hub.models.GemmaBackbone(4096, intermediate_dim=2048, **sizes)
    else:
        model = VaultGemmaBackbone(4096, intermediate_dim=1024, **sizes)
    model.save_to_preset(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "source", to="hf" if source == "hf" else "keras")
    path = tmp_path / ("saved" if source == "keras_hub" else "source")
    convert(path, tmp_path / "warm", to=to)
    monkeypatch.setattr(lazy_tensor, "BLOCK_BYTES", 2**18)
    tracemalloc.start()
    convert(path, tmp_path / "new", to=to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4 * model.count_params() > 10e6 and peak < 3e6


STOP_BEFORE_THE_END = """
import sys, time
from keras_vaultgemma.recipes import convert

def stop(*_):
    print("written", flush=True)
    time.sleep(60)

convert.model_card = stop
convert.convert("vaultgemma_tiny", sys.argv[1], to=sys.argv[2])
"""


@pytest.mark.parametrize(("to", "how"), [("keras", signal.SIGKILL), ("hf", signal.SIGTERM)])
def test_a_killed_conversion_leaves_no_target(tmp_path, to, how):
    target = tmp_path / "new"
    process = subprocess.Popen(
        [sys.executable, "-c", STOP_BEFORE_THE_END, target, to],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout.readline() == "written\n"
        assert list(tmp_path.rglob("model.*"))
    finally:
        process.send_signal(how)
        code = process.wait()
        process.stdout.close()
    if how != signal.SIGKILL:
        assert code == 128 + how
        assert list(tmp_path.iterdir()) == []
    assert not target.exists()
    convert("vaultgemma_tiny", target, to=to)
    assert open_values(target)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.long
def test_the_tool_runs_the_command(tiny, tmp_path):
    count = tiny.backbone.count_params()
    command = [
        sys.executable,
        ROOT / "tools/convert_checkpoint.py",
        "vaultgemma_tiny",
        "new",
        "--dtype",
        "bfloat16",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}
    )
    assert (done.returncode, done.stdout) == (0, f"new: {count:,} parameters in bfloat16\n"), (
        done.stderr
    )
    assert "\r" not in done.stderr  # No progress bar, because this is no terminal.
    assert names(tmp_path / "new") == names(TINY)


@pytest.mark.long
def test_tensorflow_is_not_imported(tmp_path):
    if keras.config.backend() == "tensorflow":
        pytest.skip("it is the backend")
    code = (
        "import sys; from keras_vaultgemma import convert; convert('vaultgemma_tiny', 'hf', to='hf'); "
        "convert('hf', 'keras'); print('tensorflow' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.stdout == "False\n", done.stderr
    assert presets.is_keras(tmp_path / "keras")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "is_shown"),
    [
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
        (None, True, False),
    ],
)
def test_the_progress_bar(tmp_path, monkeypatch, stream, progress, is_shown):
    """Only on a terminal, in bytes."""
    monkeypatch.setattr(sys, "stderr", stream)
    convert(TINY, tmp_path / "new", progress=progress)
    assert ("B/s]" in (stream.getvalue() if stream else "")) is is_shown


@pytest.mark.parametrize("verify", [False, True])
def test_the_progress_bar_counts_every_byte(tmp_path, monkeypatch, verify):
    """Hashed, written, hashed again and compared; but for headers and metadata, which are small."""
    bars = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(
        convert_module, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1]
    )
    convert(TINY, tmp_path / "new", verify=verify)
    (bar,) = bars
    assert bar.n == pytest.approx(bar.total, rel=0.03)
