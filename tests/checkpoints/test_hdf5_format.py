"""Weights files that Keras wrote, and files that it would not write."""

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from common import to_numpy

from keras_vaultgemma.checkpoints import lazy_tensor
from keras_vaultgemma.checkpoints.hdf5_format import open_hdf5, write_hdf5
from keras_vaultgemma.checkpoints.lazy_tensor import LazyTensor
from keras_vaultgemma.checkpoints.weight_map import Location

pytestmark = pytest.mark.any_backend


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.weights.h5"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_what_keras_writes(path, dtype):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, dtype=dtype)])
    model.save_weights(path)
    tensors = open_hdf5(path)
    assert tensors.keys() == {"layers/dense/vars/0", "layers/dense/vars/1"}
    kernel = tensors["layers/dense/vars/0"]
    assert kernel.dtype == np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert np.array_equal(
        kernel.astype("float32"), to_numpy(model.layers[0].kernel.value).astype("float32")
    )
    assert isinstance(kernel, np.memmap)
    assert not kernel.flags.writeable


def chunked(file):
    file.create_dataset("x", data=np.ones((64, 64), "float32"), chunks=(8, 8))


def compressed(file):
    file.create_dataset("x", data=np.ones((64, 64), "float32"), compression="gzip")


def unwritten(file):
    file.create_dataset("x", (2**20, 2**20), "float32", chunks=True)


def elsewhere(file):
    file.create_dataset("x", (4,), "float32", external=[("other.bin", 0, 16)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize("write", [chunked, compressed, unwritten, elsewhere, virtual])
def test_a_dataset_that_is_not_contiguous_raises(path, write):
    with h5py.File(path, "w") as file:
        write(file)
    with pytest.raises(
        ValueError, match=rf"{path.name}: x must be stored in this file, contiguous"
    ):
        open_hdf5(path)


@pytest.mark.parametrize(
    "value", [np.ones(4, "int8"), np.ones(4, ">f8"), np.ones(4, ">f4"), "text", np.zeros(4, "V2")]
)
def test_another_dtype_raises(path, value):
    with h5py.File(path, "w") as file:
        file["x"] = value
    with pytest.raises(
        ValueError,
        match=f"{path.name}: x must be float32, float16, bfloat16 or float64. Received: ",
    ):
        open_hdf5(path)


def test_links_are_not_followed(path):
    with h5py.File(path, "w") as file:
        file["x"] = np.ones(4, "float32")
        file["soft"] = h5py.SoftLink("/x")
        file["external"] = h5py.ExternalLink("/etc/passwd", "/x")
    assert open_hdf5(path).keys() == {"x"}


def test_a_damaged_file_is_named(path):
    with pytest.raises(
        ValueError, match=f"{path.name} is missing, truncated or no Keras weights file"
    ):
        open_hdf5(path)
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(50)]).save_weights(path)
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:-1], whole[:600], whole[100:]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"{path.name} is missing, truncated or no Keras weights file"
        ):
            open_hdf5(path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keras_reads_what_is_written(path, dtype):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, dtype=dtype, name="d")])
    kernel, bias = (
        np.random.default_rng(0).normal(size=shape).astype("float32") for shape in ((3, 5), (5,))
    )
    tensors = [
        (
            Location("layers/dense/vars/0", (3, 5), (0, 1)),
            LazyTensor(kernel.T.copy(), Location("", (5, 3), (1, 0)), (3, 5)),
        ),
        (
            Location("layers/dense/vars/1", (5,), (0,)),
            LazyTensor(bias, Location("", (5,), (0,)), (5,)),
        ),
    ]
    reported = []
    stored_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    write_hdf5(path, tensors, stored_dtype, {"layers/dense/vars": "d"}, reported.append)
    model.load_weights(path)
    for variable, value in zip(model.variables, (kernel, bias), strict=True):
        assert np.array_equal(
            to_numpy(variable.value).astype("float32"), value.astype(stored_dtype).astype("float32")
        )
    size = stored_dtype.itemsize
    assert reported == [15 * size, 5 * size]
    with h5py.File(path) as file:
        assert dict(file["layers/dense/vars"].attrs) == {"name": "d"}


def test_blocks_are_concatenated(path, monkeypatch):
    monkeypatch.setattr(lazy_tensor, "BLOCK_BYTES", 48)
    value = np.arange(21, dtype="float32").reshape(7, 3)
    location = Location("x", (7, 3), (0, 1))
    write_hdf5(path, [(location, LazyTensor(value, location, (7, 3)))], np.dtype("<f4"), {})
    assert np.array_equal(open_hdf5(path)["x"], value)
