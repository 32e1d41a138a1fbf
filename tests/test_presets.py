"""A preset's name or handle to a folder: bundled, local, from stand-ins for the hubs. Saving whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from common import random_backbone
from hub_stub import TOKEN, HubStub
from safetensors.numpy import save_file

from keras_vaultgemma import VaultGemmaBackbone, checkpoint, hubs, presets

# Without what the package imports, so that no test has to wait for a Keras backend in a new process.
FIND = """
import json, os, sys, types
package = types.ModuleType("keras_vaultgemma")
package.__path__ = [os.path.dirname(sys.argv[1])]
sys.modules[package.__name__] = package
from keras_vaultgemma import presets
answers = []
for handle in sys.argv[3:]:
    try:
        answers.append({"folder": str(presets.find(handle, sys.argv[2]))})
    except (ValueError, OSError, ImportError) as error:
        answers.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps(answers))
"""

LOAD = """
import json, sys
from keras_vaultgemma import VaultGemmaBackbone
print(json.dumps([w.tolist() for w in VaultGemmaBackbone.from_preset(sys.argv[1]).get_weights()]))
"""


def run(script, *arguments, env):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def find_each(handles, need="weights", *, env):
    """What `presets.find` answers in a process of its own: `{"folder"}` or `{"error", "message"}` for each handle."""
    return run(FIND, presets.__file__, need, *handles, env=env)


def find(handle, need="weights", *, env):
    return find_each([handle], need, env=env)[0]


def write_checkpoint(folder, seed):
    """A Hugging Face checkpoint of random float32 weights."""
    folder.mkdir(parents=True)
    vocabulary, width, mlp, heads, head_dim = 64, 24, 40, 2, 16
    config = dict(
        model_type="vaultgemma",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        layer_types=["full_attention"],
        max_position_embeddings=32,
    )
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        f"{layer}.input_layernorm.weight": (width,),
        f"{layer}.self_attn.q_proj.weight": (heads * head_dim, width),
        f"{layer}.self_attn.k_proj.weight": (heads * head_dim, width),
        f"{layer}.self_attn.v_proj.weight": (heads * head_dim, width),
        f"{layer}.self_attn.o_proj.weight": (width, heads * head_dim),
        f"{layer}.pre_feedforward_layernorm.weight": (width,),
        f"{layer}.mlp.gate_proj.weight": (mlp, width),
        f"{layer}.mlp.up_proj.weight": (mlp, width),
        f"{layer}.mlp.down_proj.weight": (width, mlp),
        "model.norm.weight": (width,),
    }
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(0, 0.2, shape).astype("float32") for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def content(folder):
    """{path: bytes} of every file in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def assert_same_weights(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    (write_checkpoint(root / "main", 1) / "training.bin").write_bytes(b"not for inference")
    write_checkpoint(root / "v2", 2)
    return {"main": root / "main", "v2": root / "v2"}


@pytest.fixture
def hub(checkpoints):
    gated = {"test/gated": {"resolve"}, "test/closed": {"revision", "tree", "resolve"}}
    repositories = dict.fromkeys(("test/open", *gated, "google/vaultgemma-1b"), checkpoints)
    gated["google/vaultgemma-1b"] = {"resolve"}
    with HubStub(repositories, gated) as hub:
        yield hub


# vaultgemma_1b


def test_release_is_described_by_the_bundled_preset():
    config = presets.read_json(presets.find("vaultgemma_1b", "config") / "config.json")
    assert config["registered_name"] == "keras_vaultgemma>VaultGemmaBackbone"
    assert config["config"]["dtype"]["config"]["name"] == "bfloat16"
    c = config["config"]
    attention = 4 * c["hidden_dim"] * c["num_query_heads"] * c["head_dim"]
    block = attention + 3 * c["hidden_dim"] * c["intermediate_dim"] + 2 * c["hidden_dim"]
    count = c["vocabulary_size"] * c["hidden_dim"] + c["num_layers"] * block + c["hidden_dim"]
    metadata = presets.read_json(presets.find("vaultgemma_1b", "config") / "metadata.json")
    assert count == metadata["parameter_count"] == 1_038_741_120
    privacy = metadata["privacy"]
    assert (privacy["epsilon"], privacy["delta"], privacy["noise_multiplier"]) == (2.0, 1.1e-10, 0.614)
    assert privacy["unit"] == "one sequence of 1024 consecutive tokens"


def test_bundled_config_is_what_the_release_would_be_read_as(tmp_path):
    release = dict(
        model_type="vaultgemma",
        vocab_size=256000,
        hidden_size=1152,
        num_hidden_layers=26,
        intermediate_size=6912,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention"] * 26,
        sliding_window=512,
        max_position_embeddings=1024,
        rope_theta=10000,
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
    )
    (tmp_path / "config.json").write_text(json.dumps(release))
    config = presets.read_json(presets.find("vaultgemma_1b", "config") / "config.json")["config"]
    read = checkpoint.read_config(tmp_path)
    assert read == {name: config[name] for name in read}


def test_bundled_config_has_every_argument_that_saving_writes(tmp_path):
    random_backbone(num_layers=1, name="vaultgemma_1b").save_to_preset(tmp_path)
    saved = presets.read_json(tmp_path / "config.json")
    bundled = presets.read_json(presets.find("vaultgemma_1b", "config") / "config.json")
    assert list(saved) == list(bundled)
    assert list(saved["config"]) == list(bundled["config"])


@pytest.mark.skipif(keras.config.backend() != "torch", reason="only PyTorch has a device without memory")
def test_vaultgemma_1b_builds_without_weights():
    with keras.device("meta"):
        backbone = VaultGemmaBackbone.from_preset("vaultgemma_1b", load_weights=False, dtype="bfloat16")
    assert backbone.count_params() == 1_038_741_120
    assert backbone.name == "vaultgemma_1b"
    assert {v.dtype for v in backbone.weights} == {"bfloat16"}


@pytest.mark.parametrize("place", ["vaultgemma_1b", "."])
def test_weights_in_the_users_folder_are_found(checkpoints, tmp_path, monkeypatch, place):
    home = tmp_path if place == "vaultgemma_1b" else tmp_path / "vaultgemma_1b"
    (tmp_path / "vaultgemma_1b").symlink_to(checkpoints["v2"])
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(home))
    weights = VaultGemmaBackbone.from_preset("vaultgemma_1b").get_weights()
    assert_same_weights(weights, VaultGemmaBackbone.from_preset(checkpoints["v2"]).get_weights())


def test_users_folder_is_in_the_cache_unless_named(monkeypatch):
    monkeypatch.delenv("KERAS_VAULTGEMMA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert presets.cache_home() == Path("/caches/keras_vaultgemma")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/users/somebody")
    assert presets.cache_home() == Path("/users/somebody/.cache/keras_vaultgemma")
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", "~/models")
    assert presets.cache_home() == Path("/users/somebody/models")


def test_weights_come_from_hugging_face_once_the_terms_are_accepted(hub, tmp_path):
    answer = find("vaultgemma_1b", env=hub.environment(tmp_path, HF_TOKEN=TOKEN))
    assert content(answer["folder"]).keys() == {"config.json", "model.safetensors"}
    assert hub.commit("google/vaultgemma-1b") in answer["folder"]


@pytest.mark.parametrize("reason", ["gated", "no network", "HF_HUB_OFFLINE"])
def test_one_error_names_three_ways_where_no_weights_can_be_had(hub, tmp_path, reason):
    changes = {"gated": {}, "no network": {"HF_ENDPOINT": "http://127.0.0.1:9"}, "HF_HUB_OFFLINE": {reason: "1"}}
    start = time.monotonic()
    answer = find("vaultgemma_1b", env=hub.environment(tmp_path, **changes[reason]))
    assert time.monotonic() - start < hubs.PATIENCE
    assert answer["error"] == "FileNotFoundError"
    message = answer["message"]
    assert "gated" in message
    assert "https://huggingface.co/google/vaultgemma-1b" in message and "hf auth login" in message
    assert "https://www.kaggle.com/models/keras/vaultgemma" in message and "KAGGLE_API_TOKEN" in message
    folder = tmp_path / ".cache/keras_vaultgemma/vaultgemma_1b"
    assert "hf download google/vaultgemma-1b --local-dir" in message and f"copy that folder to {folder}" in message
    tried = message.partition("What was tried:")[2].strip().splitlines()
    starts = [str(folder), "hf://google/vaultgemma-1b", "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2"]
    assert len(tried) == 3
    assert all(line.startswith(f"- {start} ") for line, start in zip(tried, starts, strict=True))
    expected = {"gated": "is gated", "no network": "cannot be asked", "HF_HUB_OFFLINE": "offline mode is enabled"}
    assert expected[reason] in tried[1]
    assert not (tmp_path / ".cache/keras_vaultgemma").exists()


# hf://


def test_backbone_from_hugging_face_is_the_one_in_the_repository(hub, checkpoints, tmp_path):
    env = hub.environment(tmp_path, PYTHONPATH=str(Path(presets.__file__).parent.parent))
    loaded = run(LOAD, "hf://test/open@v2", env=env)
    assert_same_weights(loaded, VaultGemmaBackbone.from_preset(checkpoints["v2"]).get_weights())


def test_revision_is_a_branch_tag_or_commit(hub, checkpoints, tmp_path):
    commits = hub.commit("test/open", "v2"), hub.commit("test/open", "main")
    handles = ["hf://test/open@v2", f"hf://test/open@{commits[0]}", "hf://test/open"]
    by_name, by_commit, newest = (answer["folder"] for answer in find_each(handles, env=hub.environment(tmp_path)))
    assert by_name == by_commit
    assert content(by_name) == content(checkpoints["v2"])
    assert (Path(by_name).name, Path(newest).name) == commits


def test_no_more_is_downloaded_than_asked_for(hub, tmp_path):
    env = hub.environment(tmp_path)
    assert content(find("hf://test/open", "config", env=env)["folder"]).keys() == {"config.json"}
    assert content(find("hf://test/open", "weights", env=env)["folder"]).keys() == {"config.json", "model.safetensors"}
    assert not any("training.bin" in request for request in hub.requests)


def test_cache_serves_without_network(hub, tmp_path):
    env = hub.environment(tmp_path)
    commit = hub.commit("test/open")
    folder = find("hf://test/open", env=env)["folder"]
    seen = len(hub.requests)
    handles = ["hf://test/open", f"hf://test/open@{commit}"]
    for changes in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert find_each(handles, env={**env, **changes}) == [{"folder": folder}] * 2
    assert len(hub.requests) == seen


def test_part_of_a_repository_in_the_cache_is_not_enough(hub, tmp_path):
    env = hub.environment(tmp_path)
    find("hf://test/open", "config", env=env)
    answer = find("hf://test/open", "weights", env={**env, "HF_HUB_OFFLINE": "1"})
    assert answer["error"] == "FileNotFoundError"
    assert answer["message"].startswith("hf://test/open ")


def test_gated_repository_needs_a_token_that_is_accepted(hub, tmp_path):
    handles = ["hf://test/gated", "hf://test/closed"]
    for changes in ({}, {"HF_TOKEN": "hf_somebody"}):
        for handle, answer in zip(handles, find_each(handles, env=hub.environment(tmp_path, **changes)), strict=True):
            page = handle.replace("hf://", "https://huggingface.co/")
            message = f"{handle} is gated: accept its terms at {page}, then `hf auth login`"
            assert answer == {"error": "FileNotFoundError", "message": message}
    for answer in find_each(handles, env=hub.environment(tmp_path, HF_TOKEN=TOKEN)):
        assert content(answer["folder"]).keys() == {"config.json", "model.safetensors"}


def test_wrong_hugging_face_handles(hub, tmp_path):
    messages = {
        "hf://test/none": "hf://test/none does not exist, or is private and needs `hf auth login`",
        "hf://test/open@v3": "hf://test/open@v3 has no revision 'v3'",
        "hf://test/open/more": "`preset` must be hf://org/name[@revision]. Received: 'hf://test/open/more'",
        "hf://": "`preset` must be hf://org/name[@revision]. Received: 'hf://'",
    }
    answers = find_each(messages, env=hub.environment(tmp_path))
    assert answers == [{"error": "ValueError", "message": message} for message in messages.values()]


def test_commit_that_cannot_be_asked_for_fails_at_once(hub, tmp_path):
    handle = f"hf://test/open@{'a' * 40}"
    start = time.monotonic()
    answer = find(handle, env=hub.environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:9"))
    assert time.monotonic() - start < hubs.PATIENCE
    assert answer["error"] == "FileNotFoundError"
    assert answer["message"].startswith(
        f"{handle} is not in the local cache, and the hub cannot be asked: ConnectError"
    )


def test_download_that_breaks_off_leaves_nothing_half(checkpoints, tmp_path):
    with HubStub({"test/open": checkpoints}, broken=["model.safetensors"]) as hub:
        env = hub.environment(tmp_path)
        answer = find("hf://test/open", env=env)
        assert answer["error"] == "FileNotFoundError"
        assert answer["message"].startswith("hf://test/open could not be downloaded: ")
        assert not list(tmp_path.rglob("model.safetensors"))
        hub.broken = []
        assert (
            content(find("hf://test/open", "weights", env=env)["folder"])["model.safetensors"]
            == (checkpoints["main"] / "model.safetensors").read_bytes()
        )


def test_file_of_another_size_than_announced_is_not_kept(checkpoints, tmp_path):
    with HubStub({"test/open": checkpoints}, resized=["model.safetensors"]) as hub:
        env = hub.environment(tmp_path)
        answer = find("hf://test/open", env=env)
        assert answer["error"] == "FileNotFoundError"
        assert answer["message"].startswith("hf://test/open could not be downloaded: ")
        size = (checkpoints["main"] / "model.safetensors").stat().st_size
        assert str(size + 7) in answer["message"] and str(size) in answer["message"]
        assert not list(tmp_path.rglob("model.safetensors"))
        hub.resized = []
        assert find("hf://test/open", env=env)["folder"]


def test_file_of_another_etag_than_its_content_is_not_kept(checkpoints, tmp_path):
    with HubStub({"test/open": checkpoints}, mistaken=["model.safetensors"]) as hub:
        env = hub.environment(tmp_path)
        answer = find("hf://test/open", env=env)
        sent = (checkpoints["main"] / "model.safetensors").read_bytes()
        announced, found = (hashlib.sha256(content).hexdigest() for content in (sent + b"?", sent))
        assert answer["error"] == "FileNotFoundError"
        assert answer["message"] == (
            "hf://test/open could not be downloaded: model.safetensors must have the SHA-256 "
            f"{announced}. Received: {found}"
        )
        assert not list(tmp_path.rglob("model.safetensors")) and not list(tmp_path.rglob(announced))
        hub.mistaken = []
        assert find("hf://test/open", env=env)["folder"]


def test_repository_without_weights(checkpoints, tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/config.json").write_bytes((checkpoints["main"] / "config.json").read_bytes())
    with HubStub({"test/bare": {"main": tmp_path / "repository"}}) as hub:
        answer = find("hf://test/bare", env=hub.environment(tmp_path))
    assert answer["error"] == "FileNotFoundError"
    assert answer["message"].startswith("hf://test/bare has no weights: none of model.weights.h5, ")


# kaggle://


@pytest.fixture
def kaggle_cache(tmp_path, monkeypatch):
    """What kagglehub leaves behind after a download."""
    backbone = random_backbone(num_layers=1)
    folder = tmp_path / "models/keras/vaultgemma/keras/vault_gemma_1b_en/2"
    backbone.save_to_preset(folder)
    folder.with_name("2.complete").touch()
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    return backbone, folder


def test_kaggle_preset_in_the_cache_needs_no_network(kaggle_cache):
    backbone, _ = kaggle_cache
    loaded = VaultGemmaBackbone.from_preset("kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2")
    assert_same_weights(loaded.get_weights(), backbone.get_weights())


def test_kaggle_is_asked_where_hugging_face_has_refused(hub, kaggle_cache, tmp_path):
    env = hub.environment(tmp_path, KAGGLEHUB_CACHE=os.environ["KAGGLEHUB_CACHE"])
    assert find("vaultgemma_1b", env=env) == {"folder": str(kaggle_cache[1])}


def test_kaggle_without_network(hub, tmp_path):
    handle = "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2"
    answer = find(handle, env=hub.environment(tmp_path))
    assert answer["error"] == "FileNotFoundError"
    assert answer["message"].startswith(f"{handle} could not be downloaded: ")
    assert "\n" not in answer["message"]


@pytest.mark.parametrize(
    "status, error, message",
    [
        (403, FileNotFoundError, "is gated or private"),
        (404, ValueError, "does not exist"),
        (500, OSError, "500 Server"),
    ],
)
def test_kaggle_answers_are_explained(monkeypatch, status, error, message):
    kagglehub = pytest.importorskip("kagglehub")
    requests = pytest.importorskip("requests")
    response = requests.Response()
    response.status_code = status

    def refuse(handle):
        raise requests.HTTPError(f"{status} Server Error", response=response)

    monkeypatch.setattr(kagglehub, "model_download", refuse)
    with pytest.raises(error, match=f"^kaggle://a/b/keras/c .*{message}"):
        presets.find("kaggle://a/b/keras/c")


@pytest.mark.parametrize("handle", ["kaggle://keras/vaultgemma", "kaggle://a/b/keras/c/latest", "kaggle://a//keras/c"])
def test_wrong_kaggle_handle(handle):
    with pytest.raises(ValueError, match="must be kaggle://org/model/framework/variation") as caught:
        presets.find(handle)
    assert handle in str(caught.value)


# Folders


@pytest.mark.parametrize("preset", ["vaultgemma_2b", "no/such/folder", "", "gs://bucket/model", "\0", None, 3, b"x"])
def test_unknown_preset(preset):
    with pytest.raises(ValueError, match="`preset` must be a bundled preset") as caught:
        VaultGemmaBackbone.from_preset(preset)
    assert "(vaultgemma_1b, vaultgemma_tiny), a folder, hf://" in str(caught.value)
    assert str(caught.value).endswith(f"Received: {preset!r}")


def test_file_is_no_preset(checkpoints):
    with pytest.raises(ValueError, match="`preset` must be a bundled preset"):
        presets.find(checkpoints["main"] / "config.json")


def test_folder_without_config(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"has no config\.json, so it is neither a preset nor"):
        VaultGemmaBackbone.from_preset(tmp_path)


def test_folder_without_weights(checkpoints, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoints["main"] / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"has no weights: none of model\.weights\.h5, .* is there"):
        VaultGemmaBackbone.from_preset(tmp_path)
    assert presets.find(tmp_path, "config") == tmp_path


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "must hold a JSON object. Received: list"),
    ],
)
def test_config_that_is_not_a_json_object(checkpoints, tmp_path, text, message):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        VaultGemmaBackbone.from_preset(tmp_path)
    assert f"{tmp_path / 'config.json'} {message}" in str(caught.value)


def test_whose_format_a_folder_is_in(checkpoints, tmp_path):
    assert presets.is_keras(presets.find("vaultgemma_tiny"))
    assert not presets.is_keras(checkpoints["main"])
    for name in (None, 1, "keras_hub>GemmaBackbone"):
        (tmp_path / "config.json").write_text(json.dumps({"registered_name": name}))
        assert not presets.is_keras(tmp_path)
