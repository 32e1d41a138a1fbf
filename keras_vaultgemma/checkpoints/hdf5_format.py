"""One Keras weights file (HDF5): read as memory-mapped arrays like those of a safetensors file, written by blocks."""

import math
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np

from keras_vaultgemma._files import check_link
from keras_vaultgemma.checkpoints.lazy_tensor import as_bytes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype("<f4"), np.dtype("<f2"), BFLOAT16)


def open_hdf5(path):
    """{name of a dataset: memory-mapped NumPy array} of one HDF5 file; no dataset is read yet.

    Keras writes every variable as one run of bytes, which is mapped where it lies. Links to other places are not
    followed.

    Raises:
        ValueError: names the file where it is missing, cut short, damaged or another kind of file, and the dataset
            where that is not such a run of float32, float16 or bfloat16.
    """
    path = Path(path)
    check_link(path)
    tensors = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            tensors[name] = _map(path, name, item)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    # HDF5 reports damage as any of these.
    except (OSError, KeyError, RuntimeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is missing, cut short or no Keras weights file: {error}"
        ) from error
    return tensors


def write_hdf5(path, tensors, dtype, layer_names, report=lambda name, count: None):
    """Write a weights file as Keras writes it, with no more than a block of one tensor in memory.

    Args:
        path: of the new file.
        tensors: list of (`Place`, `StoredTensor`), in the order to write.
        dtype: NumPy dtype to write.
        layer_names: `{group of a layer's variables: name of the layer}`, for all layers with variables or without.
        report: called with a tensor's name and the bytes that were written, after each block.
    """
    # Room for every tensor first, then its bytes at their place: h5py itself copies opaque bytes at half the speed.
    room = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    room.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    room.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    offsets = {}
    with h5py.File(path, "w") as file:
        for group, name in layer_names.items():
            file.create_group(group).attrs["name"] = name
        for place, _ in tensors:
            # h5py stores bfloat16 as two opaque bytes, and the attribute is how Keras knows it again.
            kind = "V2" if dtype == BFLOAT16 else dtype
            dataset = file.create_dataset(place.name, place.shape, kind, dcpl=room)
            if dtype == BFLOAT16:
                dataset.attrs["dtype"] = "bfloat16"
            offsets[place.name] = dataset.id.get_offset()
    with path.open("r+b") as file:
        for place, stored in tensors:
            file.seek(offsets[place.name])
            for block in stored.blocks(place, dtype):
                file.write(as_bytes(block))
                report(place.name, block.nbytes)


def _map(path, name, dataset):
    dtype = dataset.dtype
    if (
        dtype == np.dtype("V2") and str(dataset.attrs.get("dtype")) == "bfloat16"
    ):  # HDF5 has no such type
        dtype = BFLOAT16
    if dtype not in DTYPES:
        raise ValueError(f"{path}: {name} must be float32, float16 or bfloat16. Received: {dtype}")
    offset = (
        dataset.id.get_offset()
    )  # none where the bytes are compressed, in pieces, in another file or not there
    if offset is None or dataset.external or dataset.is_virtual:
        raise ValueError(
            f"{path}: {name} must be stored in this file, in one piece and not compressed, as Keras does"
        )
    end = offset + dtype.itemsize * math.prod(dataset.shape)
    if end > path.stat().st_size:
        raise ValueError(f"{path} is cut short: {name} ends at byte {end} of {path.stat().st_size}")
    return np.memmap(path, dtype, "r", offset, dataset.shape)
