"""Training batches in a reproducible order, so that an interrupted run can resume at any batch."""

import functools
import hashlib

import keras
import numpy as np

from keras_vaultgemma._validation import check_integer
from keras_vaultgemma.data.token_ids import first_columns

NOTHING = hashlib.sha256().hexdigest()


class Batches(keras.utils.PyDataset):
    """Batches whose order in each epoch depends only on a seed and the number of the epoch.

    Keras shuffles arrays with the global random generator of the backend and the batches of a
    `PyDataset` with that of Python, and neither can be restored. `fit` must therefore get
    `shuffle=False` together with this dataset.

    An epoch has `steps_per_epoch` batches and begins where the previous epoch ended. Each pass
    through the data has every row once.

    Args:
        data: nested arrays of shape `[N, ...]`, whose rows are shuffled, or a
            `keras.utils.PyDataset`, whose batches are shuffled as a whole. The latter must return
            the same batch for an index at every call; its `workers` are not used.
        batch_size: int. Number of rows in a batch of arrays. The last batch of a pass can have
            fewer.
        shuffle: bool. If True, each pass has another order; otherwise all have the order of `data`.
        seed: int of at least 0.
        steps_per_epoch: int. Number of batches in an epoch. Defaults to one pass.
        columns: int. Number of columns of arrays that batches have, or None for all, which the
            identity is of. Defaults to None.

    Attributes:
        seed: int. The argument.
        steps: int. Number of batches in an epoch.
        offset: int. Number of batches that the current epoch skips.
        unit: string. "rows" or "batches", the items that `indices` refers to.

    Raises:
        ValueError: If an argument is out of range, or the data cannot be read at any position, as
            those of a generator.
    """

    def __init__(self, data, batch_size, shuffle, seed, steps_per_epoch=None, columns=None):
        # Without the workers of a dataset: on JAX and PyTorch Keras reads a batch before the first
        # epoch, and batches that workers had prefetched by then would be used again, or would
        # precede the position at which the run resumes.
        super().__init__()
        self._is_dataset, self._columns = isinstance(data, keras.utils.PyDataset), columns
        if getattr(data, "is_stream", False):
            raise _not_random_access(data)
        if self._is_dataset:
            self.unit = "batches"
            self._data, self._count, self._batch_size = data, data.num_batches, 1
        else:
            check_integer("batch_size", batch_size)
            self.unit = "rows"
            self._data = keras.tree.map_structure(_as_array, data)
            self._count = len(keras.tree.flatten(self._data)[0])
            self._batch_size = int(batch_size)
        if not self._count:
            raise ValueError(f"`x` must have at least one row or batch. Received: x={data!r}")
        if not isinstance(shuffle, bool):
            raise ValueError(
                "`shuffle` must be True or False with a TrainingCheckpoint. "
                f"Received: shuffle={shuffle!r}"
            )
        check_integer("steps_per_epoch", steps_per_epoch, allow_none=True)
        self._shuffle, self.seed = shuffle, seed
        self._pass_steps = -(-self._count // self._batch_size)
        self.steps = self._pass_steps if steps_per_epoch is None else int(steps_per_epoch)
        self.start(0)

    def start(self, epoch, batch=0):
        """Make index 0 the batch with the number `batch` of an epoch, both counted from 0."""
        self._first, self.offset = epoch * self.steps + batch, batch

    @property
    def identity(self):
        """Properties that must be equal for a saved run to resume, as a dict for JSON.

        A dataset can have properties of its own as an attribute `run_identity`; otherwise they are
        the number of its batches and the content of the first and the last one.
        """
        digest, own = hashlib.sha256(), getattr(self._data, "run_identity", None)
        if not self._is_dataset:
            parts = self._data
        else:
            parts = [] if own else [self._data[0], self._data[self._count - 1]]
        for part in keras.tree.flatten(parts):
            array = np.asarray(keras.ops.convert_to_numpy(part)) if hasattr(part, "shape") else None
            is_number = array is not None and array.dtype.kind not in "OUS"
            digest.update(np.ascontiguousarray(array) if is_number else repr(part).encode())
        return {
            **(own or {"items": self._count}),
            "SHA-256": digest.hexdigest(),
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "steps_per_epoch": self.steps,
        }

    @property
    def identity_comparisons(self):
        """`{name: function(saved, current)}` of the properties that equality does not compare."""
        own = getattr(self._data, "run_identity_comparisons", {})
        if not self._is_dataset:
            return own
        # Version 0.1.0 did not look at the batches of a dataset.
        return {"SHA-256": lambda saved, current: saved in (current, NOTHING), **own}

    def indices(self, index):
        """Return the indices of a batch's rows in the arrays, or of the batch in the dataset."""
        pass_number, index = divmod(self._first + index, self._pass_steps)
        order = _order(self._count, self.seed if self._shuffle else None, pass_number)
        return order[index * self._batch_size : (index + 1) * self._batch_size]

    def __getitem__(self, index):
        indices = self.indices(index)
        if self._is_dataset:
            return self._data[int(indices[0])]
        rows = keras.tree.map_structure(lambda array: array[indices], self._data)
        return first_columns(rows, self._columns)

    def __len__(self):
        return self.steps - self.offset

    def on_epoch_begin(self):
        if self._is_dataset:
            self._data.on_epoch_begin()

    def on_epoch_end(self):
        if self._is_dataset:
            self._data.on_epoch_end()


@functools.lru_cache(maxsize=4)
def _order(count, seed, pass_number):
    """Return the order of a pass, which is that of the data if `seed` is None."""
    if seed is None:
        return np.arange(count)
    return np.random.default_rng([seed, pass_number]).permutation(count)


def _as_array(x):
    if not hasattr(x, "shape"):
        raise _not_random_access(x)
    return np.asarray(keras.ops.convert_to_numpy(x))


def _not_random_access(x):
    kind = "stream" if getattr(x, "is_stream", False) else type(x).__name__
    way = ", which can be read into a list of rows first" if hasattr(x, "__iter__") else ""
    return ValueError(
        "With a TrainingCheckpoint, `x` must be strings, arrays or a `keras.utils.PyDataset`, "
        f"which can be read at any position. Received: x of type {kind}{way}"
    )
