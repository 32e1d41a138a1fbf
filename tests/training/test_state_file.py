import os
import resource
import signal
import zipfile

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_vaultgemma.training.state import read_state_arrays, read_state_metadata, write_state

ARRAYS = {
    "weight/0": np.arange(6, dtype="float32").reshape(2, 3),
    "weight/1": np.array([1.5, -2.0, np.inf]).astype(ml_dtypes.bfloat16),
    "optimizer/0": np.array(7, "int64"),
    "seed/0": np.array([3, 2**32 - 1], "uint32"),
}
METADATA = {"position": {"epoch": 1}, "best": float("-inf")}


def written(folder, metadata=METADATA, arrays=ARRAYS):
    write_state(folder / "state", metadata, arrays)
    return folder / "state"


def read(path):
    return read_state_metadata(path), dict(read_state_arrays(path, "weight", "optimizer", "seed"))


def test_arrays_are_written_and_read_bit_for_bit(tmp_path):
    metadata, arrays = read(written(tmp_path))
    assert metadata == METADATA
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


def test_truncation_and_damage_are_detected(tmp_path):
    path = written(tmp_path)
    expected, data = read(path), path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="state is truncated or damaged"):
            read_state_metadata(path)
    detected = 0
    for offset in range(0, len(data), 3):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x41]) + data[offset + 1 :])
        try:
            metadata, arrays = read(path)
        except ValueError:
            detected += 1
        else:  # in a field that is not read, such as a date
            assert metadata == expected[0]
            assert all(np.array_equal(array, ARRAYS[name]) for name, array in arrays.items())
    assert detected > len(data) / 6


def test_a_full_disk_leaves_the_file_unchanged(tmp_path):
    """A limit on the size of files stands for the capacity of the disk."""
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
def test_a_killed_write_leaves_the_file_unchanged(tmp_path, call):
    path = written(tmp_path)
    process = os.fork()
    if not process:
        setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        written(tmp_path, metadata={}, arrays={"weight/0": np.zeros(3)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["state", "state.new"]
    assert read(path)[0] == METADATA
    written(tmp_path, metadata={})
    assert os.listdir(tmp_path) == ["state"]


def test_names_of_entries_end_with_dtypes(tmp_path):
    names = zipfile.ZipFile(written(tmp_path)).namelist()
    assert names == [
        "facts.json",
        "weight/0.float32",
        "weight/1.bfloat16",
        "optimizer/0.int64",
        "seed/0.uint32",
    ]
