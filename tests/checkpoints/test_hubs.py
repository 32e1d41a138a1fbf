"""Handles of hubs: which files are downloaded, and the errors when they cannot be."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from common import random_backbone
from hub_client import LOAD, assert_same_weights, content, find, find_each, run
from hub_stub import TOKEN, HubStub

from keras_vaultgemma import VaultGemmaBackbone
from keras_vaultgemma.checkpoints import hubs, presets

pytestmark = pytest.mark.any_backend

# hf://


def test_backbone_from_hugging_face_is_the_one_in_the_repository(hub, checkpoints, tmp_path):
    env = hub.environment(tmp_path, PYTHONPATH=str(Path(presets.__file__).parents[2]))
    loaded = run(LOAD, "hf://test/open@v2", env=env)
    assert_same_weights(loaded, VaultGemmaBackbone.from_preset(checkpoints["v2"]).get_weights())


def test_revision_is_a_branch_tag_or_commit(hub, checkpoints, tmp_path):
    commits = hub.commit("test/open", "v2"), hub.commit("test/open", "main")
    handles = ["hf://test/open@v2", f"hf://test/open@{commits[0]}", "hf://test/open"]
    by_name, by_commit, newest = (
        answer["folder"] for answer in find_each(handles, env=hub.environment(tmp_path))
    )
    assert by_name == by_commit
    assert content(by_name) == content(checkpoints["v2"])
    assert (Path(by_name).name, Path(newest).name) == commits


def test_only_needed_files_are_downloaded(hub, tmp_path):
    env = hub.environment(tmp_path)
    assert content(find("hf://test/open", "config", env=env)["folder"]).keys() == {"config.json"}
    assert content(find("hf://test/open", "weights", env=env)["folder"]).keys() == {
        "config.json",
        "model.safetensors",
    }
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
        for handle, answer in zip(
            handles, find_each(handles, env=hub.environment(tmp_path, **changes)), strict=True
        ):
            page = handle.replace("hf://", "https://huggingface.co/")
            message = f"{handle} is gated: accept its terms at {page}, then `hf auth login`"
            assert answer == {"error": "FileNotFoundError", "message": message}
    for answer in find_each(handles, env=hub.environment(tmp_path, HF_TOKEN=TOKEN)):
        assert content(answer["folder"]).keys() == {"config.json", "model.safetensors"}


def test_wrong_hugging_face_handles(hub, tmp_path):
    messages = {
        "hf://test/none": "hf://test/none does not exist, or is private and needs `hf auth login`",
        "hf://test/open@v3": "hf://test/open@v3 has no revision 'v3'",
        "hf://test/open/more": "`preset` must be hf://org/name[@revision]. Received: preset='hf://test/open/more'",
        "hf://": "`preset` must be hf://org/name[@revision]. Received: preset='hf://'",
    }
    answers = find_each(messages, env=hub.environment(tmp_path))
    assert answers == [{"error": "ValueError", "message": message} for message in messages.values()]


def test_an_unreachable_commit_fails_at_once(hub, tmp_path):
    handle = f"hf://test/open@{'a' * 40}"
    start = time.monotonic()
    answer = find(handle, env=hub.environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:9"))
    assert time.monotonic() - start < hubs.TIMEOUT
    assert answer["error"] == "FileNotFoundError"
    assert answer["message"].startswith(
        f"{handle} is not in the local cache, and the hub is unreachable: ConnectError"
    )


def test_an_interrupted_download_leaves_no_partial_file(checkpoints, tmp_path):
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


def test_a_file_of_another_size_than_announced_is_deleted(checkpoints, tmp_path):
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


def test_a_file_whose_content_differs_from_its_etag_is_deleted(checkpoints, tmp_path):
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
    (tmp_path / "repository/config.json").write_bytes(
        (checkpoints["main"] / "config.json").read_bytes()
    )
    with HubStub({"test/bare": {"main": tmp_path / "repository"}}) as hub:
        answer = find("hf://test/bare", env=hub.environment(tmp_path))
    assert answer["error"] == "FileNotFoundError"
    assert answer["message"].startswith("hf://test/bare has no weights: none of model.weights.h5, ")


# kaggle://


@pytest.fixture
def kaggle_cache(tmp_path, monkeypatch):
    """Create the files that kagglehub caches after a download."""
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


def test_kaggle_is_tried_after_hugging_face(hub, kaggle_cache, tmp_path):
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
def test_errors_of_kaggle_are_explained(monkeypatch, status, error, message):
    kagglehub = pytest.importorskip("kagglehub")
    requests = pytest.importorskip("requests")
    response = requests.Response()
    response.status_code = status

    def fail(handle):
        raise requests.HTTPError(f"{status} Server Error", response=response)

    monkeypatch.setattr(kagglehub, "model_download", fail)
    with pytest.raises(error, match=f"^kaggle://a/b/keras/c .*{message}"):
        presets.find("kaggle://a/b/keras/c")


@pytest.mark.parametrize(
    "handle", ["kaggle://keras/vaultgemma", "kaggle://a/b/keras/c/latest", "kaggle://a//keras/c"]
)
def test_wrong_kaggle_handle(handle):
    with pytest.raises(
        ValueError, match="must be kaggle://org/model/framework/variation"
    ) as caught:
        presets.find(handle)
    assert handle in str(caught.value)
