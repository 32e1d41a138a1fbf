"""Training batches in an order that a run which was interrupted finds again."""

import functools
import hashlib

import keras
import numpy as np


class Batches(keras.utils.PyDataset):
    """The batches of an epoch, each epoch's in an order that is a function of a seed and the epoch alone.

    Keras shuffles arrays with the global generator of the backend (NumPy, PyTorch or TensorFlow) and the batches of a
    `PyDataset` with Python's, none of which a run can be put back to; so `fit` must be told `shuffle=False` with this.

    An epoch has `steps_per_epoch` batches, and they go round and round through the data: each pass has every row once.

    Args:
        data: nested arrays with one first axis, of which rows are shuffled, or a `keras.utils.PyDataset`, of which
            whole batches are. The latter must return the same batch for an index whenever it is asked; its `workers`
            are not used.
        batch_size: rows of a batch of arrays; the last of a pass may have fewer.
        shuffle: whether each pass has an order of its own, or all the data's.
        seed: int from 0.
        steps_per_epoch: defaults to one pass.

    Raises:
        ValueError: for data that cannot be read at a position, such as a generator, and arguments out of range.
    """

    def __init__(self, data, batch_size, shuffle, seed, steps_per_epoch=None):
        # Without the dataset's workers: on JAX and PyTorch Keras looks at a batch before the first epoch, and what
        # they have read ahead until then is trained on again, or comes from before the place where a run goes on.
        super().__init__()
        self._is_dataset = isinstance(data, keras.utils.PyDataset)
        if self._is_dataset:
            self.items_are = "batches"
            self._data, self._count, self._batch_size = data, data.num_batches, 1
        else:
            self.items_are = "rows"
            self._data = keras.tree.map_structure(_as_array, data)
            self._count, self._batch_size = (
                len(keras.tree.flatten(self._data)[0]),
                _positive("batch_size", batch_size),
            )
        if not self._count:
            raise ValueError(f"`x` must have a row or a batch at least. Received: {data!r}")
        if not isinstance(shuffle, bool):
            raise ValueError(
                f"`shuffle` must be True or False in a run that can be resumed. Received: shuffle={shuffle!r}"
            )
        self._shuffle, self.seed = shuffle, seed
        self._pass = -(-self._count // self._batch_size)
        self.steps = (
            self._pass if steps_per_epoch is None else _positive("steps_per_epoch", steps_per_epoch)
        )
        self.start(0)

    def start(self, epoch, batch=0):
        """What is read from now on are the batches of `epoch` from `batch` on."""
        self._first, self.done = epoch * self.steps + batch, batch

    @property
    def facts(self):
        """What must be the same for a run to go on: a dict for JSON.

        Of a dataset it is its own `run_facts`, or the number of batches where it has none.
        """
        digest = hashlib.sha256()
        for array in [] if self._is_dataset else keras.tree.flatten(self._data):
            digest.update(np.ascontiguousarray(array))
        return {
            **getattr(self._data, "run_facts", {"items": self._count}),
            "SHA-256": digest.hexdigest(),
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "steps_per_epoch": self.steps,
        }

    def items(self, index):
        """The rows of the arrays, or the index of the dataset, that batch `index` from the start on is made of."""
        turn, index = divmod(self._first + index, self._pass)
        order = _order(self._count, self.seed if self._shuffle else None, turn)
        return order[index * self._batch_size : (index + 1) * self._batch_size]

    def __getitem__(self, index):
        items = self.items(index)
        if self._is_dataset:
            return self._data[int(items[0])]
        return keras.tree.map_structure(lambda array: array[items], self._data)

    def __len__(self):
        return self.steps - self.done

    def on_epoch_begin(self):
        if self._is_dataset:
            self._data.on_epoch_begin()

    def on_epoch_end(self):
        if self._is_dataset:
            self._data.on_epoch_end()


@functools.lru_cache(maxsize=4)
def _order(count, seed, turn):
    return (
        np.arange(count) if seed is None else np.random.default_rng([seed, turn]).permutation(count)
    )


def _as_array(x):
    if not hasattr(x, "shape"):
        raise ValueError(
            "A run that can be resumed needs data that can be read at any position: strings, arrays or a "
            f"`keras.utils.PyDataset`. Received: x of type {type(x).__name__}"
        )
    return np.asarray(keras.ops.convert_to_numpy(x))


def _positive(name, value):
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return int(value)
