"""The batches of a private run: rows drawn by truncated Poisson sampling, in arrays of one shape."""

import keras
import numpy as np

from keras_vaultgemma.privacy import noise_seeds, row_sampling


class PrivateBatches(keras.utils.PyDataset):
    """Batch i has the rows and the noise seeds of step `first_step + i`, and is the same whenever it is asked for.

    A batch is `(x, y, step)`. Rows that were drawn come first in x and y, then zeros up to the shape that all batches
    have. What else a step needs stands where Keras has sample weights, so that it leaves the model's inputs alone:
    - sample_weight: those of the rows, where there are any;
    - count: int32 [1], how many were drawn;
    - noise_seeds: int32 [V, 4];
    - layer_seeds: int32 [1 + S, 2], of PyTorch's global generator and of the model's own seeds;
    - noise_multiplier, expected_rows: float32 [1].

    Args:
        rows: `as_rows`.
        steps: `accounting.Steps` that a run does; its count is not read.
        length: how many batches there are.
        variables: V, how many variables get noise.
        microbatch: the shape has a multiple of so many rows.
        secret: 16 bytes (secret_key.py).
        first_step: int, 0 or more.
        dataset: fingerprint of the rows.
        layers: S, how many seeds the model's random layers have.

    Attributes:
        run_facts: what must be the same for a run to go on; how many batches there are need not be.
    """

    def __init__(self, rows, steps, length, variables, microbatch, secret, first_step, dataset, layers=0):
        super().__init__()
        self.run_facts = {"rows": steps.rows, "fingerprint": dataset}
        self._rows, self._steps, self._length, self._variables = rows, steps, length, variables
        self._layers = layers
        self._secret, self._first_step = secret, first_step
        self._capacity = -(-min(steps.max_batch_size, steps.rows) // microbatch) * microbatch

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        step, steps = self._first_step + index, self._steps
        drawn = row_sampling.rows(
            self._secret, step, steps.rows, steps.sampling_probability, max_batch_size=steps.max_batch_size
        )
        seeds = [noise_seeds.seed(self._secret, step, i) for i in range(self._variables)]
        layer_seeds = [noise_seeds.layer_seed(self._secret, step, i) for i in range(1 + self._layers)]

        def take(array):
            taken = np.zeros((self._capacity, *array.shape[1:]), array.dtype)
            taken[: len(drawn)] = array[drawn]
            return taken

        x, y, *weight = keras.tree.map_structure(take, self._rows)
        return (
            x,
            y,
            {
                "count": np.array([len(drawn)], "int32"),
                "noise_seeds": np.stack(seeds).view("int32"),
                "layer_seeds": np.stack(layer_seeds),
                "noise_multiplier": np.array([steps.noise_multiplier], "float32"),
                "expected_rows": np.array([steps.rows * steps.sampling_probability], "float32"),
                **({"sample_weight": weight[0]} if weight else {}),
            },
        )


def as_rows(x, y=None, sample_weight=None):
    """Training data as nested NumPy arrays `(x, y)` or `(x, y, sample_weight)`, N long, of which rows can be drawn.

    A `keras.utils.PyDataset` is read once, batch by batch.

    Raises:
        ValueError: for data whose rows cannot be drawn one by one, such as a generator or a `tf.data.Dataset`.
    """
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches is None:
            raise ValueError("A `keras.utils.PyDataset` for private training must have a length. Received: none")
        batches = [_packed(*keras.utils.unpack_x_y_sample_weight(x[i])) for i in range(x.num_batches)]
        return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)
    return _packed(x, y, sample_weight)


def _packed(*parts):
    def as_array(x):
        if not hasattr(x, "shape"):
            raise ValueError(
                "Private training draws its rows one by one: data must be strings, arrays or a "
                f"`keras.utils.PyDataset`. Received: {type(x).__name__}"
            )
        return np.asarray(keras.ops.convert_to_numpy(x))

    return keras.tree.map_structure(as_array, tuple(part for part in parts if part is not None))
