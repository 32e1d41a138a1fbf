"""Where a converted model comes from, and what may be said of it."""

import hashlib
import json

import pytest

from keras_vaultgemma.checkpoints import metadata, presets
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.checkpoints.metadata import new_metadata

pytestmark = pytest.mark.any_backend

RELEASED = 1_038_741_120


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "assets/tokenizer").mkdir(parents=True)
    for name in (
        "config.json",
        "metadata.json",
        "model.safetensors",
        "assets/tokenizer/vocabulary.spm",
        "notes.txt",
    ):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    return tmp_path


def test_digests_of_the_files_of_a_model(folder, monkeypatch):
    monkeypatch.setattr(metadata, "PIECE", 7)
    reported = []
    digests = metadata.digests(folder, lambda *part: reported.append(part))
    assert list(digests) == ["assets/tokenizer/vocabulary.spm", "config.json", "model.safetensors"]
    for name, digest in digests.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert sum(count for _, count in reported) == sum(
        (folder / name).stat().st_size for name in digests
    )
    assert {name for name, _ in reported} == {"vocabulary.spm", "config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("vaultgemma_1b", True),
        ("hf://google/vaultgemma-1b", True),
        ("hf://google/vaultgemma-1b@main", True),
        ("kaggle://keras/vaultgemma/keras/vault_gemma_1b_en", True),
        ("kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2", True),
        ("kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/12", True),
        ("hf://google/vaultgemma-1b-it", False),
        ("hf://somebody/vaultgemma-1b", False),
        ("kaggle://keras/vaultgemma/keras/vault_gemma_1b_en_tuned/2", False),
        ("vaultgemma_tiny", False),
        ("a/folder", False),
    ],
)
def test_what_the_release_is_called(source, expected):
    assert bool(presets.release_metadata(source, RELEASED)) is expected
    assert not presets.release_metadata(source, RELEASED + 1)


def test_the_release_is_given_its_statement(tmp_path):
    metadata = new_metadata("hf://google/vaultgemma-1b", tmp_path, {}, RELEASED, DTYPES["bfloat16"])
    stated = json.loads((presets.bundled()["vaultgemma_1b"] / "metadata.json").read_text())
    assert metadata["privacy"] == stated["privacy"] and metadata["privacy"]["epsilon"] == 2.0
    assert metadata["license"] == stated["license"]
    assert "description" not in metadata
    assert (metadata["dtype"], metadata["parameter_count"]) == ("bfloat16", RELEASED)


@pytest.mark.parametrize(
    ("source", "count"), [("hf://google/vaultgemma-1b", 5), ("hf://a/b", RELEASED)]
)
def test_no_other_source_is(tmp_path, source, count):
    metadata = new_metadata(source, tmp_path, {}, count, DTYPES["float32"])
    assert "privacy" not in metadata and "license" not in metadata


def test_what_a_source_states_is_handed_on(folder):
    stated = {
        "privacy": None,
        "license": "mine",
        "corpus": {"name": "x"},
        "dtype": "float32",
        "files": {"a": "b"},
    }
    stated["source"] = {"name": "hf://before", "revision": "1"}
    (folder / "metadata.json").write_text(json.dumps(stated))
    metadata = new_metadata("vaultgemma_1b", folder, {"x": "y"}, RELEASED, DTYPES["float16"])
    assert (metadata["privacy"], metadata["license"], metadata["corpus"]) == (
        None,
        "mine",
        {"name": "x"},
    )
    assert metadata["source"] == {
        "name": "vaultgemma_1b",
        "revision": None,
        "files": {"x": "y"},
        "source": {"name": "hf://before", "revision": "1"},
    }
    assert metadata["dtype"] == "float16" and "files" not in metadata


def test_a_folder_is_noted_without_its_path(folder):
    assert new_metadata(folder, folder, {}, 1, DTYPES["float32"])["source"]["name"] == folder.name


@pytest.mark.parametrize(
    ("source", "place", "revision"),
    [
        ("hf://org/name@main", "models--org--name/snapshots/0123abc", "0123abc"),
        ("kaggle://org/model/keras/variation", "org/model/keras/variation/3", "3"),
        ("vaultgemma_1b", "vaultgemma_1b", None),
    ],
)
def test_revision_of_a_hub(tmp_path, source, place, revision):
    (tmp_path / place).mkdir(parents=True)
    metadata = new_metadata(source, tmp_path / place, {}, 1, DTYPES["float32"])
    assert (metadata["source"]["name"], metadata["source"]["revision"]) == (source, revision)


def test_a_folder_called_2_is_no_revision(tmp_path):
    (tmp_path / "2").mkdir()
    assert (
        new_metadata(tmp_path / "2", tmp_path / "2", {}, 1, DTYPES["float32"])["source"]["revision"]
        is None
    )
