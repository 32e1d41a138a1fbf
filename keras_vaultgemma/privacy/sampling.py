"""Truncated Poisson sampling of rows, and the dataset of batches that private training draws.

Each record is drawn independently with probability q. If more than Bmax are drawn, a uniformly
random subset of Bmax of them remains. A batch may be empty, and its step is done like any other.
This is the sampling that `accounting` accounts for (Abadi et al.; Chua et al. for the truncation).
Batches of a fixed size and epochs over shuffled data are other mechanisms, whose ε is larger than
that of Poisson sampling.

Privacy amplification by sampling requires that nobody knows which records were drawn. The random
bits are therefore cryptographic: SHAKE-256, keyed with 256 bits that HMAC-SHA256 derives from the
secret of the run, the step and a counter.

References:
    - [Abadi et al., 2016](https://arxiv.org/abs/1607.00133)
    - [Chua et al., 2024](https://arxiv.org/abs/2411.04205)
    - [FIPS 202](https://doi.org/10.6028/NIST.FIPS.202): SHAKE-256
"""

import hashlib

import keras
import numpy as np

from keras_vaultgemma._validation import check_integer, check_number
from keras_vaultgemma.privacy import fingerprint
from keras_vaultgemma.privacy.seeds import derive, layer_seed, noise_seed

EXTRA = (6.0, 16)
"""Gaps that are drawn at once beyond the expected number: a number of standard deviations and a
constant. They rarely do not suffice; then another block is drawn."""


class PrivateBatches(keras.utils.PyDataset):
    """Dataset whose batch i has the rows and noise seeds of step `first_step + i`.

    Batch i is the same every time it is read. It is a tuple `(x, y, step)` of arrays. The drawn
    records, each a row or a user, come first in `x` and `y`, followed by zeros up to the shape that
    all batches have. With D devices, arrays have D equal parts, one for each device, as Keras
    divides them. Each part begins with its share of the drawn records, n / D of them rounded up or
    down. `step` takes the place of Keras's sample weights, so that the inputs of the model are left
    alone. It is a dict:

    - `count`: int32 of shape `[D]`. Number of records that were drawn for each device.
    - `drawn`: int32 of shape `[D]`. Number of all of them, equal for all devices.
    - `noise_seeds`: int32 of shape `[D, variables, 4]`, equal for all devices.
    - `layer_seeds`: int32 of shape `[D, 1 + layers, 2]`. Seed of PyTorch's global generator,
      followed by the model's own seeds. They differ between devices.
    - `noise_multiplier`, `expected_rows`: float32 of shape `[D]`, equal for all devices.
    - `sample_weight`: the weights of the rows, if there are any.
    - `is_drawn`: bool of shape `[capacity, k]`, if records are users. False for rows that only fill
      the shape of a user.

    Args:
        rows: nested arrays, as `as_rows` returns them.
        steps: `accounting.Steps`. The steps of the run; its count is ignored.
        length: int. Number of batches.
        variables: int. Number of variables that get noise.
        secret: bytes of length 16. Secret of one call of `fit`.
        first_step: int, 0 or more.
        dataset: str. Fingerprint of the data.
        layers: int. Number of seeds of the model's random layers. Defaults to 0.
        groups: `Groups`. Each record is then a user and has k consecutive rows of a batch. Defaults
            to None: each record is a row.
        devices: int. D, the number of devices that compute a batch. Defaults to 1.
        own_parts: list of int. The devices whose parts a batch has, which are those of this
            process. Defaults to None: all of them.

    Attributes:
        largest: int. Largest number of records that a batch may draw.
        capacity: int. Number of records of all batches, drawn or zeros, on all devices together.
        run_identity: dict of the properties that must be equal for an interrupted run to resume.
            The number of batches is not among them.
        run_identity_comparisons: dict of functions `(saved, current)` for the properties that need
            not be equal.
    """

    def __init__(
        self,
        rows,
        steps,
        length,
        variables,
        secret,
        first_step,
        dataset,
        layers=0,
        groups=None,
        devices=1,
        own_parts=None,
    ):
        super().__init__()
        self.run_identity = {"rows": steps.rows, "fingerprint": dataset}
        self.run_identity_comparisons = {"fingerprint": fingerprint.may_be_equal}
        self._rows, self._steps, self._length, self._variables = rows, steps, length, variables
        self._layers, self._groups = layers, groups
        self._secret, self._first_step = secret, first_step
        self._devices, self._own_parts = devices, own_parts
        self.largest = min(steps.max_batch_size, steps.rows)
        self.capacity = -(-self.largest // devices) * devices

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
        devices = self._devices
        seeds = [noise_seed(self._secret, step, i) for i in range(self._variables)]
        layer_seeds = [
            [layer_seed(self._secret, step, i, device) for i in range(1 + self._layers)]
            for device in range(devices)
        ]

        # Dealt like cards, because parts of consecutive records would leave the last devices idle.
        turn, device = divmod(np.arange(len(drawn)), devices)
        positions = device * (self.capacity // devices) + turn
        taken, per_record, users = drawn, 1, {}
        if self._groups is not None:
            taken, is_drawn = self._groups.select(self._secret, step, drawn)
            taken, per_record = taken.reshape(-1), self._groups.max_rows
            users = {"is_drawn": _filled(is_drawn, positions, self.capacity)}

        def take(array):
            rows = _at(positions, per_record)
            return _filled(array[taken], rows, self.capacity * per_record)

        def each(value, dtype):
            return np.repeat(np.asarray(value, dtype)[None], devices, axis=0)

        x, y, *weight = keras.tree.map_structure(take, self._rows)
        batch = (
            x,
            y,
            {
                "count": np.bincount(device, minlength=devices).astype("int32"),
                "drawn": each(len(drawn), "int32"),
                "noise_seeds": each(np.stack(seeds).view("int32"), "int32"),
                "layer_seeds": np.array(layer_seeds),
                "noise_multiplier": each(steps.noise_multiplier, "float32"),
                "expected_rows": each(steps.rows * steps.sampling_probability, "float32"),
                **({"sample_weight": weight[0]} if weight else {}),
                **users,
            },
        )
        return keras.tree.map_structure(self._own, batch)

    def _own(self, array):
        """Return the parts of an array for the devices of this process."""
        if self._own_parts is None:
            return array
        parts = array.reshape(self._devices, -1, *array.shape[1:])[self._own_parts]
        return parts.reshape(-1, *array.shape[1:])


def _at(positions, count):
    """Return the positions of records that have `count` consecutive rows each."""
    return (positions[:, None] * count + np.arange(count)).reshape(-1)


def _filled(array, positions, length):
    """Return the elements of an array at some positions, and zeros elsewhere."""
    filled = np.zeros((length, *array.shape[1:]), array.dtype)
    filled[positions] = array
    return filled


def as_rows(x, y=None, sample_weight=None):
    """Return training data as nested NumPy arrays, whose rows can be drawn one by one.

    Args:
        x: nested arrays or tensors of shape `[N, ...]`, or a `keras.utils.PyDataset`, each batch of
            which is read twice and must be equal both times.
        y: nested arrays or tensors of shape `[N, ...]`, or None. Defaults to None.
        sample_weight: array or tensor of shape `[N, ...]`, or None. Defaults to None.

    Returns:
        Tuple `(x, y)` or `(x, y, sample_weight)` of nested NumPy arrays of shape `[N, ...]`.

    Raises:
        ValueError: If the rows cannot be drawn one by one, as those of a generator or a
            `tf.data.Dataset`, or if those of a dataset change.
    """
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches is None:
            raise ValueError(
                "A `keras.utils.PyDataset` for private training must have a length. Received: none"
            )
        batches = [_batch(x, i) for i in range(x.num_batches)]
        return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)
    return _as_arrays(x, y, sample_weight)


def _batch(dataset, index):
    """Return a batch of a dataset as arrays, which must be the same each time it is read."""
    once, again = (
        _as_arrays(*keras.utils.unpack_x_y_sample_weight(dataset[index])) for _ in range(2)
    )
    same = keras.tree.map_structure(
        lambda a, b: a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"),
        once,
        again,
    )
    if not all(keras.tree.flatten(same)):
        raise ValueError(
            "A `keras.utils.PyDataset` for private training must have the same rows whenever it is "
            "read, without shuffling and augmentation: private training draws its rows itself, and "
            "the ledger recognises them by their values. "
            f"Received: batch {index}, which differed when it was read again"
        )
    return once


def _as_arrays(*parts):
    def as_array(x):
        if not hasattr(x, "shape"):
            raise ValueError(
                "Private training draws its rows one by one: data must be strings, arrays or a "
                "`keras.utils.PyDataset`, or a table of strings. Read a stream into a list of "
                f"rows first. Received: {type(x).__name__}"
            )
        return np.asarray(keras.ops.convert_to_numpy(x))

    return keras.tree.map_structure(as_array, tuple(part for part in parts if part is not None))


def sample_rows(secret, step, count, probability, max_batch_size=None):
    """Return the indices of the rows of one step by truncated Poisson sampling.

    The gap between two drawn rows, the number of rows left out in between, is geometric:
    P(gap >= k) = (1 - q)^k. Drawing the gaps has the same distribution as one decision for each
    row, and needs a random number for each drawn row only. A gap is computed in float64 from 53
    random bits, so that P(gap >= k) has an absolute error of 2^-53 and a relative error of
    1e-15 (1 + k q): for ten million rows and a q of 1e-7 or more, the probability of every row is q
    to within one part in 1e8.

    Args:
        secret: bytes of length 16. Secret of one call of `fit`, in which no step is used twice.
        step: int, 0 or more.
        count: int. N, the number of rows, 1 or more.
        probability: float in (0, 1]. q.
        max_batch_size: int, 1 or more. Bmax. Defaults to None, which means no truncation.

    Returns:
        int64 array of shape `[n]` with increasing values from 0 to `count - 1`; n may be 0. The
        result is the same for the same arguments.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    from keras_vaultgemma.privacy.sampling import sample_rows
    from keras_vaultgemma.privacy.seeds import new_secret

    rows = sample_rows(new_secret(), step=0, count=1000, probability=0.05, max_batch_size=80)
    ```
    """
    check_integer("count", count)
    check_number("probability", probability, above=0, maximum=1)
    check_integer("max_batch_size", max_batch_size, allow_none=True)
    drawn = _poisson_sample(secret, step, count, probability)
    if max_batch_size is None or len(drawn) <= max_batch_size:
        return drawn
    # The rows with the smallest of independent 64-bit numbers are a uniformly random subset.
    keys = random_bits(secret, "truncation", step, 0, len(drawn))
    return np.sort(drawn[np.argsort(keys, kind="stable")[:max_batch_size]])


def _poisson_sample(secret, step, count, probability):
    """Return the indices of the rows that are drawn before truncation."""
    expected = count * probability
    size = max(1, int(expected + EXTRA[0] * expected**0.5) + EXTRA[1])
    with np.errstate(divide="ignore"):
        log_left_out = np.log1p(-probability)
    found, last, block = [], -1, 0
    while last < count:
        bits = random_bits(secret, "sampling", step, block, size)
        # In (0, 1] and multiples of 2^-53, so that the logarithm is finite.
        uniform = ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
        # Clip at `count`: a gap beyond the last row ends the sample, and the sum must not overflow.
        gaps = np.minimum(np.log(uniform) / log_left_out, count).astype("int64")
        found.append(last + np.cumsum(gaps + 1))
        last, block = int(found[-1][-1]), block + 1
    drawn = np.concatenate(found)
    return drawn[: np.searchsorted(drawn, count)]


def random_bits(secret, purpose, step, block, size):
    """Return independent uniform random bits, a uint64 array of shape `[size]`."""
    key = derive(secret, purpose, step, block)
    return np.frombuffer(hashlib.shake_256(key).digest(8 * size), "<u8")
