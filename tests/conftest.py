"""Fixtures that several tests share."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
from common import random_backbone
from hub_client import write_checkpoint
from hub_stub import HubStub

from keras_vaultgemma import VaultGemmaCausalLM, backend


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def model():
    return VaultGemmaCausalLM(random_backbone())


@pytest.fixture(scope="session")
def tiny():
    """The bundled preset; a test that changes a model loads its own."""
    return VaultGemmaCausalLM.from_preset("vaultgemma_tiny")


@pytest.fixture
def own_key(monkeypatch, tmp_path):
    """Fingerprints of private data have a key of the test's own, and not the user's."""
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))


@pytest.fixture
def no_cache(monkeypatch):
    """The cache of compiled programs is a setting of the whole process, and of the user's."""
    monkeypatch.setattr(backend, "cache_compilations", lambda folder: None)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of two revisions of a repository."""
    root = tmp_path_factory.mktemp("checkpoints")
    (write_checkpoint(root / "main", 1) / "training.bin").write_bytes(b"not for inference")
    write_checkpoint(root / "v2", 2)
    return {"main": root / "main", "v2": root / "v2"}


@pytest.fixture
def hub(checkpoints):
    """A hub with open and gated repositories."""
    gated = {"test/gated": {"resolve"}, "test/closed": {"revision", "tree", "resolve"}}
    repositories = dict.fromkeys(("test/open", *gated, "google/vaultgemma-1b"), checkpoints)
    gated["google/vaultgemma-1b"] = {"resolve"}
    with HubStub(repositories, gated) as hub:
        yield hub
