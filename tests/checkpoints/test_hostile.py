"""Damaged and hostile checkpoints: a clean error or the right weights, without much time or memory."""

import json
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest
from common import RELEASE_LIKE, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from keras_vaultgemma import VaultGemmaBackbone, VaultGemmaCausalLM
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.reader import open_values
from keras_vaultgemma.checkpoints.safetensors_format import open_tensors
from keras_vaultgemma.recipes.convert import convert

pytestmark = pytest.mark.any_backend

EXAMPLES = 700
"""Number of damaged copies of each of three files."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return `{format: (folder, {path of the variable: value})}` of a small model."""

    root = tmp_path_factory.mktemp("hostile")
    model = VaultGemmaCausalLM(
        VaultGemmaBackbone(**{**RELEASE_LIKE, "num_layers": 1, "vocabulary_size": 32})
    )
    model.save_to_preset(root / "keras")
    convert(root / "keras", root / "hf", to="hf", shard_size=20_000, progress=False)
    weights = {v.path: to_numpy(v) for v in model.backbone.variables}
    return {name: (root / name, weights) for name in ("keras", "hf")}


def outcome(folder):
    """Return the weights, or the error if it is of a documented type."""
    start = time.process_time()
    tracemalloc.start()
    try:
        _, values = open_values(folder)
        result = {path: value.read("float32") for path, value in values.items()}
    except ValueError as error:
        assert str(folder) in str(error) or "Expected shape" in str(error), (
            f"names no file: {error}"
        )
        result = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - start < 1
    assert peak < 20e6
    return result


edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.floats(0, 1)),
        st.tuples(st.just("splice"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("copy"), st.floats(0, 1), st.floats(0, 1)),
    ),
    min_size=1,
    max_size=4,
)


def edited(data, changes, header):
    """`data` with edits; half of them fall into the first `header` bytes, where they hurt most."""
    data = bytearray(data)
    for i, (kind, where, what) in enumerate(changes):
        at = int(where * (min(header, len(data)) if i % 2 == 0 else len(data)))
        if kind == "flip" and at < len(data):
            data[at] ^= what
        elif kind == "cut":
            del data[at : at + int(what * 200) + 1]
        elif kind == "splice":
            data[at:at] = what
        elif kind == "copy":
            other = int(what * len(data))
            data[at : at + 16] = data[other : other + 16]
    return bytes(data)


@pytest.mark.parametrize(
    "kind, name, header",
    [
        ("hf", "model-00001-of-00002.safetensors", 900),
        ("hf", "model.safetensors.index.json", 900),
        ("keras", "model.weights.h5", 6000),
    ],
)
def test_random_damage(folders, tmp_path, kind, name, header):
    source, weights = folders[kind]
    name = (
        name
        if (source / name).exists()
        else sorted(p.name for p in source.glob("*.safetensors"))[0]
    )
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    original = (source / name).read_bytes()
    tally = {"equal": 0, "error": 0, "other values": 0}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(edits)
    def run(changes):
        damaged = edited(original, changes, header)
        (
            folder / name
        ).unlink()  # a new file, for arrays of the last example may still map the old one
        (folder / name).write_bytes(damaged)
        result = outcome(folder)
        if isinstance(result, ValueError):
            tally["error"] += 1
            return
        assert {path: value.shape for path, value in result.items()} == {
            p: v.shape for p, v in weights.items()
        }
        same = all(np.array_equal(result[path], weights[path]) for path in weights)
        tally["equal" if same else "other values"] += 1
        # Bytes of a tensor carry no check sum: other values are legal. A changed header must not change them.
        if name.endswith(".json"):
            assert same

    run()
    assert tally["error"] > EXAMPLES / 10
    print(name, tally)


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def folder(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders["hf"][0] / "config.json").read_bytes())
    return tmp_path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, data",
    [
        ({"w": {"dtype": "F32", "shape": [50000, 50000], "data_offsets": [0, 10**10]}}, b"\0" * 8),
        ({"w": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, b"\0" * 8),
        ({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
        ({"w": ENTRY, "v": ENTRY}, b"\0" * 8),
        ({"w": {**ENTRY, "data_offsets": [8, 16]}}, b"\0" * 16),
        ({"w": {**ENTRY, "dtype": "PICKLE"}}, b"\0" * 8),
        ({"w": {**ENTRY, "shape": "2"}}, b"\0" * 8),
        ({"w": 3}, b"\0" * 8),
        (
            b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": {"dtype": "F32"}}',
            b"\0" * 8,
        ),
        (b"[" * 100_000, b""),
        (b'{"w": ' * 100_000, b""),
        (b'{"w": ' + b"9" * 5_000 + b"}", b""),
        (b"\xff\xfe", b""),
    ],
    ids=range(13),
)
def test_hostile_headers(folder, header, data):
    write(folder / "model.safetensors", header, data)
    error = outcome(folder)
    assert isinstance(error, ValueError) and "model.safetensors" in str(error)


def test_a_header_that_claims_to_be_larger_than_the_file(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "model.safetensors" in str(outcome(folder))


@pytest.mark.parametrize(
    "bomb", [b"[" * 10**6, b'{"a":' * 10**5, b"{" + b'"a":1,' * 2_000_000 + b'"b":1}', b"9" * 10**6]
)
def test_json_bombs(folder, bomb):
    for name in ("config.json", "model.safetensors.index.json"):
        original = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(bomb)
        error = outcome(folder)
        assert isinstance(error, ValueError) and name in str(error)
        if original is not None:
            (folder / name).write_bytes(original)


def test_sizes_of_a_config_are_checked_against_the_file(folders, folder):
    source = folders["hf"][0]
    for path in source.glob("model*"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 2**30
    (folder / "config.json").write_text(json.dumps(config))
    error = outcome(folder)
    assert "model.embed_tokens.weight" in str(error) and str(2**30) in str(error)


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.pkl", "..\\x.safetensors"],
)
def test_an_index_that_leaves_the_folder(folder, file):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    error = outcome(folder)
    assert "model.safetensors.index.json" in str(error) and repr(file) in str(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_not_followed(folders, tmp_path, name):
    secret, folder = tmp_path / "secret", tmp_path / "preset"
    folder.mkdir()
    secret.write_text("{}")
    (folder / "config.json").write_bytes((folders["hf"][0] / "config.json").read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    error = outcome(folder)
    assert (
        isinstance(error, ValueError) and "leaves its folder" in str(error) and name in str(error)
    )


def test_links_of_the_hubs_cache_and_inside_the_folder_are(folders, tmp_path):
    source, weights = folders["hf"]
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(p for p in source.iterdir() if p.is_file()):
        (repository / "blobs" / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", str(i)))
    result = outcome(snapshot)
    assert all(np.array_equal(result[path], weights[path]) for path in weights)


def test_a_pickle_is_not_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        presets.find(folder)
    assert not (folder / "owned").exists() and not os.path.exists("owned")


def test_the_safetensors_library_agrees(folders):
    """On the undamaged files of this module."""
    source, _ = folders["hf"]
    for path in source.glob("*.safetensors"):
        ours = open_tensors(source)
        for name, tensor in load_file(path).items():
            np.testing.assert_array_equal(ours[name], tensor)
