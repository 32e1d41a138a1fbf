"""A Keras weights file (HDF5), read as memory-mapped arrays and written in blocks."""

import math
from pathlib import Path

import h5py
import numpy as np

from keras_vaultgemma._files import check_link, ignore_progress
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.foreign_files import explain_pointer
from keras_vaultgemma.checkpoints.lazy_tensor import DTYPES, READABLE, as_bytes

BFLOAT16 = DTYPES["bfloat16"]


def open_hdf5(path):
    """Open a Keras weights file, without reading any tensor.

    Keras writes every variable as one contiguous run of bytes, which is memory-mapped at its
    offset. Links inside the file are not followed.

    Args:
        path: `pathlib.Path` or string.

    Returns:
        Dict of dataset names to memory-mapped NumPy arrays.

    Raises:
        ValueError: If the file is missing, truncated, damaged or no HDF5 file, or if a dataset is
            not contiguous or not of float32, float16, bfloat16 or float64.
    """
    path = Path(path)
    check_link(path)
    tensors = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and not name.endswith(presets.LEDGER):
            tensors[name] = _map(path, name, item)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    # h5py raises any of these for a damaged file.
    except (OSError, KeyError, RuntimeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is missing, truncated or no Keras weights file: {error}"
            f"{explain_pointer(path) if path.is_file() else ''}"
        ) from error
    return tensors


def write_hdf5(path, tensors, dtype, layer_names, report=ignore_progress):
    """Write a weights file as Keras does, with the memory of one block of one tensor.

    Args:
        path: `pathlib.Path` of the new file.
        tensors: list of (`Location`, `LazyTensor`) pairs, in the order to write.
        dtype: NumPy dtype to write.
        layer_names: dict of HDF5 groups to layer names, for all layers with or without variables.
        report: callable. Called with the number of bytes of each block after it is written.
    """
    # Allocate every dataset first and write its bytes at their offset, because h5py copies opaque
    # bytes at half the speed.
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    offsets = {}
    with h5py.File(path, "w") as file:
        for group, name in layer_names.items():
            file.create_group(group).attrs["name"] = name
        for location, _ in tensors:
            # HDF5 has no bfloat16: Keras stores two opaque bytes and the attribute.
            stored_dtype = "V2" if dtype == BFLOAT16 else dtype
            dataset = file.create_dataset(location.name, location.shape, stored_dtype, dcpl=layout)
            if dtype == BFLOAT16:
                dataset.attrs["dtype"] = "bfloat16"
            offsets[location.name] = dataset.id.get_offset()
    with path.open("r+b") as file:
        for location, tensor in tensors:
            file.seek(offsets[location.name])
            for block in tensor.blocks(location, dtype):
                file.write(as_bytes(block))
                report(block.nbytes)


def _map(path, name, dataset):
    dtype = dataset.dtype
    if dtype == np.dtype("V2") and str(dataset.attrs.get("dtype")) == "bfloat16":
        dtype = BFLOAT16
    if dtype not in READABLE:
        raise ValueError(
            f"{path}: {name} must be float32, float16, bfloat16 or float64. Received: {dtype}"
        )
    # None if the bytes are compressed, chunked, in another file or not allocated.
    offset = dataset.id.get_offset()
    if offset is None or dataset.external or dataset.is_virtual:
        raise ValueError(
            f"{path}: {name} must be stored in this file, contiguous and not compressed, as Keras "
            "does"
        )
    end = offset + dtype.itemsize * math.prod(dataset.shape)
    if end > path.stat().st_size:
        raise ValueError(f"{path} is truncated: {name} ends at byte {end} of {path.stat().st_size}")
    return np.memmap(path, dtype, "r", offset, dataset.shape)
