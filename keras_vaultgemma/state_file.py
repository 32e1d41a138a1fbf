"""One file of named arrays and facts that is whole at any time, whatever ends the process that writes it.

A zip archive of .npy files, which has a CRC-32 of each; NumPy's own .npz would hold all arrays in memory at once.
"""

import json
import os
import struct
import zipfile

import keras
import ml_dtypes  # noqa: F401  (tells NumPy the names of its dtypes)
import numpy as np

FACTS = "facts.json"


def write(path, facts, values):
    """Write a file beside `path`, see it on disk, and put it in the place of `path`.

    Args:
        path: `pathlib.Path` in a folder that exists.
        facts: dict for JSON.
        values: {name: Keras variable or array}; no more than one is copied at a time.

    Raises:
        OSError: where it cannot be written; `path` is then as it was.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(FACTS, json.dumps(facts, default=float))
                for name, value in values.items():
                    _write_array(archive, name, as_array(value))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    _see_on_disk(path.parent)


def as_array(value):
    """A Keras variable's value as a NumPy array, which may be the very memory; an array as it is."""
    return np.asarray(keras.ops.convert_to_numpy(value.value if isinstance(value, keras.Variable) else value))


def _see_on_disk(folder):
    # The new name is on disk when the folder is; Windows opens no folders.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_facts(path):
    """The facts of a file that `write` made, after all of it has been read and its check sums compared.

    Raises:
        ValueError: where the file is cut short or damaged.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                if damaged is None:
                    return json.loads(archive.read(FACTS))
        except (zipfile.BadZipFile, EOFError, KeyError, OSError, RuntimeError, ValueError, struct.error) as error:
            damaged = error
    raise ValueError(f"{path} is cut short or damaged ({damaged}). Delete it to start the run again")


def read_arrays(path, *groups):
    """Iterate over (name, array) of a file that `read_facts` has accepted, for names that start with "group/"."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            if entry.partition("/")[0] in groups:
                yield _read_array(archive, entry)


# NumPy's format has no bfloat16: an entry's name tells its dtype, and the bits are those of an unsigned integer.


def _write_array(archive, name, array):
    bits = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
    with archive.open(f"{name}.{array.dtype.name}", "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, bits, allow_pickle=False)


def _read_array(archive, entry):
    name, _, dtype = entry.rpartition(".")
    with archive.open(entry) as file:
        return name, np.lib.format.read_array(file, allow_pickle=False).view(dtype)
