import os
import resource
import signal
import zipfile

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_vaultgemma.training.state import read_state_arrays, read_state_facts, write_state

ARRAYS = {
    "weight/0": np.arange(6, dtype="float32").reshape(2, 3),
    "weight/1": np.array([1.5, -2.0, np.inf]).astype(ml_dtypes.bfloat16),
    "optimizer/0": np.array(7, "int64"),
    "seed/0": np.array([3, 2**32 - 1], "uint32"),
}
FACTS = {"position": {"epoch": 1}, "best": float("-inf")}


def written(folder, facts=FACTS, arrays=ARRAYS):
    write_state(folder / "state", facts, arrays)
    return folder / "state"


def read(path):
    return read_state_facts(path), dict(read_state_arrays(path, "weight", "optimizer", "seed"))


def test_what_was_written_comes_back_to_the_bit(tmp_path):
    facts, arrays = read(written(tmp_path))
    assert facts == FACTS
    assert list(arrays) == list(ARRAYS)
    for name, array in arrays.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            ARRAYS[name].dtype,
            ARRAYS[name].shape,
            ARRAYS[name].tobytes(),
        )
    assert list(dict(read_state_arrays(tmp_path / "state", "weight"))) == ["weight/0", "weight/1"]
    assert os.listdir(tmp_path) == ["state"]


def test_variables_are_written_like_arrays(tmp_path):
    variables = {
        "weight/0": keras.Variable([1.0, 2.0]),
        "weight/1": keras.Variable([0.1], dtype="bfloat16"),
    }
    _, arrays = read(written(tmp_path, arrays=variables))
    assert arrays["weight/0"].tolist() == [1, 2]
    assert arrays["weight/1"].tobytes() == np.array([0.1]).astype(ml_dtypes.bfloat16).tobytes()


def test_every_cut_and_every_damage_is_seen(tmp_path):
    path = written(tmp_path)
    expected, data = read(path), path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="state is cut short or damaged"):
            read_state_facts(path)
    seen = 0
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        try:
            facts, arrays = read(path)
        except ValueError:
            seen += 1
        else:  # a date, say, in the archive's directory
            assert facts == expected[0]
            assert all(np.array_equal(array, ARRAYS[name]) for name, array in arrays.items())
    assert seen > len(data) / 6


def test_a_full_disk_leaves_the_last_file(tmp_path):
    """The limit on a file's size stands for the disk's: the kernel refuses the bytes beyond it."""
    path = written(tmp_path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            written(tmp_path, arrays={"weight/0": np.zeros(10_000, "float32")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.filterwarnings("ignore:.*fork")  # the child computes nothing
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_killed_write_leaves_the_last_file(tmp_path, call):
    path = written(tmp_path)
    process = os.fork()
    if not process:
        setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        written(tmp_path, facts={}, arrays={"weight/0": np.zeros(3)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["state", "state.new"]
    assert read(path)[0] == FACTS
    written(tmp_path, facts={})
    assert os.listdir(tmp_path) == ["state"]


def test_names_tell_dtypes(tmp_path):
    names = zipfile.ZipFile(written(tmp_path)).namelist()
    assert names == [
        "facts.json",
        "weight/0.float32",
        "weight/1.bfloat16",
        "optimizer/0.int64",
        "seed/0.uint32",
    ]
