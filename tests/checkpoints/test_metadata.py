"""metadata.json and the model card: where a converted model comes from, and its privacy."""

import hashlib
import json

import pytest
from common import RELEASE_LIKE

from keras_vaultgemma.checkpoints import metadata, presets
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES
from keras_vaultgemma.checkpoints.metadata import digests, new_metadata
from keras_vaultgemma.checkpoints.model_card import model_card

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
    monkeypatch.setattr(metadata, "HASH_CHUNK", 7)
    reported = []
    found = digests(folder, reported.append)
    assert list(found) == ["assets/tokenizer/vocabulary.spm", "config.json", "model.safetensors"]
    for name, digest in found.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert sum(reported) == sum((folder / name).stat().st_size for name in found)
    assert max(reported) == 7


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
def test_names_of_the_release(source, expected):
    assert bool(presets.release_metadata(source, RELEASED)) is expected
    assert not presets.release_metadata(source, RELEASED + 1)


def test_the_release_gets_its_statement(tmp_path):
    found = new_metadata("hf://google/vaultgemma-1b", tmp_path, {}, RELEASED, DTYPES["bfloat16"])
    stated = json.loads((presets.bundled()["vaultgemma_1b"] / "metadata.json").read_text())
    assert found["privacy"] == stated["privacy"] and found["privacy"]["epsilon"] == 2.0
    assert found["license"] == stated["license"]
    assert "description" not in found
    assert (found["dtype"], found["parameter_count"]) == ("bfloat16", RELEASED)


@pytest.mark.parametrize(
    ("source", "count"), [("hf://google/vaultgemma-1b", 5), ("hf://a/b", RELEASED)]
)
def test_no_other_source_gets_a_statement(tmp_path, source, count):
    found = new_metadata(source, tmp_path, {}, count, DTYPES["float32"])
    assert "privacy" not in found and "license" not in found


def test_the_statements_of_a_source_are_copied(folder):
    stated = {
        "privacy": None,
        "license": "mine",
        "corpus": {"name": "x"},
        "dtype": "float32",
        "files": {"a": "b"},
    }
    stated["source"] = {"name": "hf://before", "revision": "1"}
    (folder / "metadata.json").write_text(json.dumps(stated))
    found = new_metadata("vaultgemma_1b", folder, {"x": "y"}, RELEASED, DTYPES["float16"])
    assert (found["privacy"], found["license"], found["corpus"]) == (
        None,
        "mine",
        {"name": "x"},
    )
    assert found["source"] == {
        "name": "vaultgemma_1b",
        "revision": None,
        "files": {"x": "y"},
        "source": {"name": "hf://before", "revision": "1"},
    }
    assert found["dtype"] == "float16" and "files" not in found


def test_a_folder_is_recorded_without_its_path(folder):
    assert new_metadata(folder, folder, {}, 1, DTYPES["float32"])["source"]["name"] == folder.name


@pytest.mark.parametrize(
    ("source", "path", "revision"),
    [
        ("hf://org/name@main", "models--org--name/snapshots/0123abc", "0123abc"),
        ("kaggle://org/model/keras/variation", "org/model/keras/variation/3", "3"),
        ("vaultgemma_1b", "vaultgemma_1b", None),
    ],
)
def test_revision_of_a_hub(tmp_path, source, path, revision):
    (tmp_path / path).mkdir(parents=True)
    found = new_metadata(source, tmp_path / path, {}, 1, DTYPES["float32"])
    assert (found["source"]["name"], found["source"]["revision"]) == (source, revision)


def test_a_folder_named_2_is_no_revision(tmp_path):
    (tmp_path / "2").mkdir()
    assert (
        new_metadata(tmp_path / "2", tmp_path / "2", {}, 1, DTYPES["float32"])["source"]["revision"]
        is None
    )


# The model card.

HYPERPARAMETERS = {
    **RELEASE_LIKE,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
CARD_METADATA = {
    "parameter_count": 1_234_567,
    "dtype": "bfloat16",
    "keras_vaultgemma_version": "9.8.7",
    "source": {"name": "hf://org/name", "revision": "abc", "files": {}},
}


def test_a_card_of_the_release():
    release = json.loads((presets.bundled()["vaultgemma_1b"] / "metadata.json").read_text())
    stated = {key: release[key] for key in ("license", "privacy")}
    card = model_card("hf", {**CARD_METADATA, **stated}, HYPERPARAMETERS, True)
    for text in (
        "library_name: transformers\n",
        "Converted from `hf://org/name`, revision `abc` by keras_vaultgemma 9.8.7, stored in bfloat16.",
        "- parameters: 1,234,567\n",
        "- hidden_dim: 48\n",
        "- layer_types: 2 x full_attention, 1 x sliding_attention\n",
        "- ε: 2.0\n- δ: 1.1e-10\n- unit of protection: one sequence of 1024 consecutive tokens\n",
        "- mechanism: DP-SGD with truncated Poisson subsampling\n",
        "- what it covers: Google's pre-training only",
        "## Licence\n\nGemma Terms of Use (https://ai.google.dev/gemma/terms).\n",
        "AutoTokenizer.from_pretrained",
    ):
        assert text in card
    assert card.startswith("---\n") and card.endswith("\n")


@pytest.mark.parametrize(
    "stated, sentence",
    [
        ({}, "The source makes no statement about privacy."),
        ({"privacy": None}, "The source states that it was not trained with differential privacy."),
        ({"privacy": "a sentence"}, "a sentence"),
        ({"privacy": {"epsilon": 3.0, "colour": "red"}}, "- ε: 3.0\n- colour: red"),
    ],
)
def test_privacy_is_what_the_source_states(stated, sentence):
    card = model_card("keras", {**CARD_METADATA, **stated}, HYPERPARAMETERS, False)
    assert f"## Privacy\n\n{sentence}\n\n## Licence\n" in card


def test_a_card_of_a_source_that_states_nothing():
    metadata = {**CARD_METADATA, "source": {"name": "folder", "revision": None}, "description": 5}
    card = model_card("keras", metadata, HYPERPARAMETERS, False)
    assert "library_name: keras-hub\n" in card
    assert "Converted from `folder` by keras_vaultgemma" in card
    assert 'from_preset("path/to/this/folder", preprocessor=None)' in card
    assert "The source states no licence; its terms apply to this copy too." in card


def test_what_a_link_out_of_the_folder_leads_to_is_not_hashed(tmp_path):
    (tmp_path / "secret.json").write_text("secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{}")
    (tmp_path / "folder/notes.json").symlink_to(tmp_path / "secret.json")
    assert digests(tmp_path / "folder").keys() == {"config.json"}
