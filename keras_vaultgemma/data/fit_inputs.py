"""Conversion of the data that users pass to `fit` into what Keras's data adapters take."""

import warnings

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.data.containers import as_plain
from keras_vaultgemma.data.streams import as_batches
from keras_vaultgemma.data.token_ids import check_ids, check_rank

EMPTY = "Data must have at least one batch. Received: none"


def prepare_fit_inputs(
    x,
    y,
    sample_weight,
    preprocess,
    vocabulary_size,
    labels_are_ids=True,
    batch_size=None,
    steps=None,
):
    """Preprocess and check the arguments of `fit`.

    Arrays are preprocessed at once, streams batch by batch as they are read.

    Args:
        x: raw samples, as the preprocessor takes them; a `keras.utils.PyDataset` of batches of raw
            samples; a stream of batches or of single samples; or a dict of token ids.
        y: labels if `x` is a dict of token ids, else None.
        sample_weight: weights of the labels if `x` is a dict of token ids, else None.
        preprocess: callable. Takes and returns a batch `(x, y, sample_weight)`. If None, the data
            are passed on as they are.
        vocabulary_size: int. V, against which ids in arrays are checked.
        labels_are_ids: bool. If True, labels whose weight is not 0 are checked against V too.
            Defaults to `True`.
        batch_size: int. Number of samples of a batch, if a stream has single ones. Defaults to 32.
        steps: int. Number of batches of an epoch of a stream. Defaults to all.

    Returns:
        Tuple `(x, y, sample_weight)` for `keras.Model.fit`.

    Raises:
        ValueError: If the data are empty (an empty stream raises when it is read), an item is no
            string, an id is outside the vocabulary, or labels or weights are given with data that
            have their own.
    """

    if preprocess is not None:
        x = as_batches(as_plain(x), batch_size, steps)

    def check_batch(x, y=None, sample_weight=None):
        check_rank(x["token_ids"])
        token_ids = _array(x["token_ids"])
        if token_ids is not None:
            check_ids(token_ids, vocabulary_size)
        if labels_are_ids:
            _check_labels(_array(y), _array(sample_weight), vocabulary_size)

    if isinstance(x, dict) and "token_ids" in x:
        if hasattr(x["token_ids"], "shape") and x["token_ids"].shape[0] == 0:
            raise ValueError(EMPTY)
        check_batch(x, y, sample_weight)
        return x, y, sample_weight
    is_tf_data = backend.is_tensorflow(x) and hasattr(x, "cardinality")
    is_empty = isinstance(x, keras.utils.PyDataset) and x.num_batches == 0
    if is_empty or (is_tf_data and int(x.cardinality()) == 0):
        raise ValueError(EMPTY)
    if preprocess is None or x is None:
        return x, y, sample_weight
    check_no_labels(y, sample_weight)

    def preprocess_batch(*batch):
        # `tf.data` unpacks a tuple into arguments; a PyDataset or generator passes the tuple.
        is_tuple = len(batch) == 1 and isinstance(batch[0], tuple)
        data = preprocess(*(batch[0] if is_tuple else batch))
        check_batch(*keras.utils.unpack_x_y_sample_weight(data))
        return data

    if isinstance(x, keras.utils.PyDataset):
        return _PreprocessedDataset(x, preprocess_batch), None, None
    if is_tf_data:
        return x.map(preprocess_batch), None, None
    if hasattr(x, "__next__"):
        return _preprocess_stream(x, preprocess_batch), None, None
    # Keras needs a batch axis, which a single sample lacks.
    return keras.tree.map_structure(np.atleast_2d, preprocess(x))


def check_no_labels(y, sample_weight):
    """Raise ValueError for labels or weights that are given with raw samples or a stream.

    They would have no effect, because such data have their own.

    Args:
        y: labels, or None.
        sample_weight: weights of the labels, or None.
    """
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"`{name}` must be None with texts, pairs, chats and streams, which have their "
                "own. To weight tokens, call `preprocessor(texts)`, change the weights that it "
                "returns and pass its arrays to `fit`. "
                f"Received: {name} of type {type(value).__name__}"
            )


def _array(x):
    """Return an array or tensor with a concrete value as a NumPy array, anything else as None."""
    if not hasattr(x, "shape") or backend.is_symbolic_tensorflow(x):
        return None
    return keras.ops.convert_to_numpy(x)


def _check_labels(y, weights, vocabulary_size):
    """Raise ValueError for labels outside the vocabulary whose weight is not 0. `y` may be None."""
    if y is None:
        return
    if weights is not None:
        # The loss broadcasts weights of whole rows in the same way.
        weights = weights.reshape(*weights.shape, *[1] * (y.ndim - weights.ndim))
        y = y[np.broadcast_to(weights, y.shape) != 0]
    check_ids(y, vocabulary_size, "Labels `y` whose sample weight is not 0")


def _preprocess_stream(batches, function):
    """Yield `function(batch)` for each batch. A generator, the only iterator that Keras takes."""
    batch = None
    for batch in batches:
        yield function(batch)
    if batch is None:
        raise ValueError(EMPTY)


class _PreprocessedDataset(keras.utils.PyDataset):
    """A `PyDataset` that applies a function to the batches of another.

    Args:
        dataset: `keras.utils.PyDataset`.
        function: callable. Takes and returns a batch.
    """

    def __init__(self, dataset, function):
        self.is_stream = getattr(dataset, "is_stream", False)
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self.dataset = dataset
        self.function = function

    def __len__(self):
        return len(self.dataset)

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __getitem__(self, index):
        return self.function(self.dataset[index])

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


class TruncationCounter:
    """Count of the rows that a preprocessor truncates.

    A context manager that warns on exit, and whenever `report` is called. A batch counts once,
    however often Keras reads it, and equal batches count as one. Rows that are read by other
    processes (`use_multiprocessing=True`) are not counted.
    """

    def __init__(self):
        self.counts = {}

    def count(self, rows, weights):
        """Count the truncated rows of a batch.

        Args:
            rows: list of B lists of ints. Token ids before truncation.
            weights: int array of shape `[B, T]`. Sample weights of the labels after truncation.
        """
        self.sequence_length = weights.shape[1]
        # A row of T + 1 tokens fits, because its last token is only a label.
        is_truncated = np.array([len(row) > self.sequence_length + 1 for row in rows])
        has_no_label = is_truncated & ~weights.any(axis=1)
        batch = hash(tuple(map(tuple, rows)))
        self.counts[batch] = (len(rows), is_truncated.sum(), has_no_label.sum())

    def report(self):
        """Warn if rows were truncated since the last call."""
        if not self.counts:
            return
        rows, truncated, without_label = np.sum([*self.counts.values()], axis=0)
        self.counts = {}
        if truncated:
            lost = f"; the whole response was lost in {without_label} of them"
            warnings.warn(
                f"{truncated} of {rows} rows were longer than "
                f"sequence_length={self.sequence_length} and were truncated"
                f"{lost if without_label else ''}.",
                stacklevel=3,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.report()
