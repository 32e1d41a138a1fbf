"""Truncated Poisson sampling: the rows of a step.

Each row is drawn independently with probability q; of more than Bmax rows a uniformly random subset of Bmax remains; no
rows is a sample as well, and its step is done like any other. This is the sampling that `accounting` accounts for
(Abadi et al., 2016, arXiv:1607.00133; Chua et al., 2024, arXiv:2411.04205, for the truncation). Batches of a fixed
size, or epochs over shuffled rows, are not: their ε is larger than what Poisson sampling's says.

Amplification by sampling holds because nobody knows who was drawn, so the random bits are cryptographic ones: SHAKE-256
(FIPS 202), keyed with 256 bits that HMAC-SHA256 derives from the run's secret, the step and a counter.
"""

import hashlib

import keras
import numpy as np

from keras_vaultgemma.privacy.seeds import derive, layer_seed, noise_seed

EXTRA = (6.0, 16)
"""Gaps that are drawn at once beyond the expected number: deviations, and a constant. They are rarely too few; then
another block follows."""


def sample_rows(secret, step, count, probability, max_batch_size=None):
    """Indices of the rows of one step; the same for the same arguments.

    The gap between two drawn rows is geometric, P(gap >= g) = (1 - q)^g. That is equivalent in law to a decision for
    each row, and takes a random number for each drawn row instead. A gap is computed in float64 from 53 random bits, so
    that P(gap >= g) is right to an absolute 2^-53 and a relative 1e-15 (1 + g q): for ten million rows and q of 1e-7 or
    more, a row's probability is q to within one part in 1e8.

    Args:
        secret: 16 bytes, as `secret_key.new` returns them; of one call of `fit`, in which no step comes twice.
        step: int, 0 or more.
        count: N, the number of rows, 1 or more.
        probability: q, in (0, 1].
        max_batch_size: Bmax, 1 or more; None for no truncation.

    Returns:
        int64 [n], increasing, of numbers from 0 to `count` - 1; n may be 0.

    Raises:
        ValueError: for an argument outside its range.
    """
    if count < 1:
        raise ValueError(f"`count` must be 1 or more. Received: count={count}")
    if not 0 < probability <= 1:
        raise ValueError(
            f"`probability` must be above 0 and at most 1. Received: probability={probability}"
        )
    if max_batch_size is not None and max_batch_size < 1:
        raise ValueError(
            f"`max_batch_size` must be 1 or more. Received: max_batch_size={max_batch_size}"
        )
    drawn = _poisson(secret, step, count, probability)
    if max_batch_size is None or len(drawn) <= max_batch_size:
        return drawn
    # The rows with the smallest of independent 64-bit numbers are a uniformly random subset.
    keys = _random_bits(secret, "truncation", step, 0, len(drawn))
    return np.sort(drawn[np.argsort(keys, kind="stable")[:max_batch_size]])


def _poisson(secret, step, count, probability):
    expected = count * probability
    size = max(1, int(expected + EXTRA[0] * expected**0.5) + EXTRA[1])
    with np.errstate(divide="ignore"):
        log_left_out = np.log1p(-probability)
    found, last, block = [], -1, 0
    while last < count:
        bits = _random_bits(secret, "sampling", step, block, size)
        # In (0, 1], multiples of 2^-53: the logarithm is finite.
        uniform = ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
        # A gap beyond the last row ends the sample, however large; as a sum it must not overflow.
        gaps = np.minimum(np.log(uniform) / log_left_out, count).astype("int64")
        found.append(last + np.cumsum(gaps + 1))
        last, block = int(found[-1][-1]), block + 1
    drawn = np.concatenate(found)
    return drawn[: np.searchsorted(drawn, count)]


def _random_bits(secret, purpose, step, block, size):
    """uint64 [size], independent and uniform."""
    key = derive(secret, purpose, step, block)
    return np.frombuffer(hashlib.shake_256(key).digest(8 * size), "<u8")


# MERGED: """The batches of a private run: rows drawn by truncated Poisson sampling, in arrays of one shape."""
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

    def __init__(
        self, rows, steps, length, variables, microbatch, secret, first_step, dataset, layers=0
    ):
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
        drawn = sample_rows(
            self._secret,
            step,
            steps.rows,
            steps.sampling_probability,
            max_batch_size=steps.max_batch_size,
        )
        seeds = [noise_seed(self._secret, step, i) for i in range(self._variables)]
        layer_seeds = [layer_seed(self._secret, step, i) for i in range(1 + self._layers)]

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
            raise ValueError(
                "A `keras.utils.PyDataset` for private training must have a length. Received: none"
            )
        batches = [
            _packed(*keras.utils.unpack_x_y_sample_weight(x[i])) for i in range(x.num_batches)
        ]
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
