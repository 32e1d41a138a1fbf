"""Fixtures that several tests share, and what keeps the suite fast.

CONTRIBUTING.md explains the markers.
"""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Set before a backend is imported, because XLA's compilations are most of a test's time and few tests are about them.
# Workers and subprocesses share the cache. `make test-all` sets FULL_OPTIMIZATION and compiles as users do.
if not os.environ.get("FULL_OPTIMIZATION"):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if os.environ.get("KERAS_BACKEND") == "tensorflow":
        os.environ.setdefault(
            "XLA_FLAGS",
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        )
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

LONGEST_FIRST = """
test_distribution test_loss test_convert test_train_step test_mechanism test_generator test_private_resume test_fit
test_docs test_finetune test_causal_lm test_checkpoint test_trainer test_planning test_requests test_hubs test_checks
test_privacy_audit test_parity test_commands test_accounting test_hostile test_reader test_prompt_lookup test_packaging
"""
"""Files in order of their duration, so that the two workers end together."""


def pytest_configure(config):
    config.addinivalue_line("markers", "any_backend: no backend changes the result; runs on one")
    config.addinivalue_line("markers", "first_backend: runs on one, and on all in `make test-all`")
    config.addinivalue_line("markers", "every_backend: an exception to `first_backend`")
    config.addinivalue_line("markers", "long: runs in `make test-all` only")


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST_FIRST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True, scope="session")
def home(tmp_path_factory):
    """No test reads or writes the user's own keys, ledgers and weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_process():
    """Settings of a worker's process that save time and change no result.

    Keras collects garbage whenever a layer is quantized; all generations take half a second where three backends are
    imported. What is imported is left out of all collections, `gc.collect()` has the youngest two generations, and
    the oldest, to which compiled functions add millions of objects, is hardly ever collected.
    """
    import keras

    if keras.config.backend() == "tensorflow" and not os.environ.get("FULL_OPTIMIZATION"):
        import tensorflow as tf

        # Grappler takes a fifth of the time of compiling a small model.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    collect = gc.collect
    collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 1000)
    gc.collect = lambda generation=1: collect(generation)
    yield
    gc.collect = collect


@pytest.fixture(autouse=True)
def seed():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture
def model():
    from common import random_backbone

    from keras_vaultgemma import VaultGemmaCausalLM

    return VaultGemmaCausalLM(random_backbone(num_layers=1))


@pytest.fixture(scope="session")
def tiny():
    """The bundled preset; a test that changes a model loads its own."""
    from keras_vaultgemma import VaultGemmaCausalLM

    return VaultGemmaCausalLM.from_preset("vaultgemma_tiny")


@pytest.fixture
def own_key(monkeypatch, tmp_path):
    """The test has a key and a ledger of the machine of its own, without runs of other tests."""
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))


@pytest.fixture
def no_cache(monkeypatch):
    """The cache of compiled functions is a setting of the whole process, and of the user's."""
    from keras_vaultgemma import backend

    monkeypatch.setattr(backend, "cache_compilations", lambda folder: None)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of two revisions of a repository."""
    from hub_client import write_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    (write_checkpoint(root / "main", 1) / "training.bin").write_bytes(b"not for inference")
    write_checkpoint(root / "v2", 2)
    return {"main": root / "main", "v2": root / "v2"}


@pytest.fixture
def hub(checkpoints):
    """A hub with open and gated repositories."""
    from hub_stub import HubStub

    gated = {"test/gated": {"resolve"}, "test/closed": {"revision", "tree", "resolve"}}
    repositories = dict.fromkeys(("test/open", *gated, "google/vaultgemma-1b"), checkpoints)
    gated["google/vaultgemma-1b"] = {"resolve"}
    with HubStub(repositories, gated) as hub:
        yield hub
