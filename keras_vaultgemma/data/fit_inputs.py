"""What users hand to `fit`, as what Keras's own data adapters take."""

import warnings

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.data.token_ids import check_ids

NO_DATA = "Data must have one batch or more. Received: none"


def prepare_fit_inputs(x, y, sample_weight, preprocess, vocabulary_size, labels_are_ids=True):
    """Raw training data to `(x, y, sample_weight)`.

    Args:
        x: what the preprocessor is called on; a `keras.utils.PyDataset`, generator or `tf.data.Dataset` of batches of
            it; or a dict of ids.
        y, sample_weight: labels and weights where `x` is a dict of ids, else None.
        preprocess: function of a batch `(x, y, sample_weight)` to the same, or None to pass everything on.
        vocabulary_size: ids in arrays are checked against it.
        labels_are_ids: whether `y` is checked, too, where its weight is not 0.

    Returns:
        `(x, y, sample_weight)`. Arrays are preprocessed at once, streams batch by batch as they are read.

    Raises:
        ValueError: for empty data (a stream that turns out to be empty raises when it is read), items that are not
            strings, ids outside the vocabulary, or labels or weights beside data that have their own.
    """

    def check_batch(x, y=None, sample_weight=None):
        token_ids = _array(x["token_ids"])
        if token_ids is not None:
            check_ids(token_ids, vocabulary_size)
        if labels_are_ids:
            _check_labels(_array(y), _array(sample_weight), vocabulary_size)

    if isinstance(x, dict) and "token_ids" in x:
        if hasattr(x["token_ids"], "shape") and x["token_ids"].shape[0] == 0:
            raise ValueError(NO_DATA)
        check_batch(x, y, sample_weight)
        return x, y, sample_weight
    is_tf_data = backend.is_tensorflow(x) and hasattr(x, "cardinality")
    if (isinstance(x, keras.utils.PyDataset) and x.num_batches == 0) or (
        is_tf_data and int(x.cardinality()) == 0
    ):
        raise ValueError(NO_DATA)
    if preprocess is None or x is None:
        return x, y, sample_weight
    check_no_labels(y, sample_weight)

    def preprocess_batch(*batch):
        # A PyDataset or generator yields a tuple, `tf.data` spreads it.
        data = preprocess(*(batch[0] if len(batch) == 1 and isinstance(batch[0], tuple) else batch))
        check_batch(*keras.utils.unpack_x_y_sample_weight(data))
        return data

    if isinstance(x, keras.utils.PyDataset):
        return PreprocessedDataset(x, preprocess_batch), None, None
    if is_tf_data:
        return x.map(preprocess_batch), None, None
    if hasattr(x, "__next__"):
        return preprocess_stream(x, preprocess_batch), None, None
    # A single sample gets the batch axis that Keras wants.
    return keras.tree.map_structure(np.atleast_2d, preprocess(x))


def check_no_labels(y, sample_weight):
    """Raise ValueError for labels or weights beside raw samples or a stream, which would have no effect."""
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"`{name}` must be None beside texts, pairs, chats and streams, which have their own. To weigh tokens, "
                "call `preprocessor(texts)`, and give `fit` the arrays of ids that it returns, with other weights. "
                f"Received: {name} of type {type(value).__name__}"
            )


def _array(x):
    """NumPy array of an array or tensor that has a value, else None."""
    return (
        keras.ops.convert_to_numpy(x)
        if hasattr(x, "shape") and not backend.is_symbolic_tensorflow(x)
        else None
    )


def _check_labels(y, weights, vocabulary_size):
    """Raise ValueError for labels outside the vocabulary whose weight is not 0; None is not looked at."""
    if y is None:
        return
    if weights is not None:
        # As the loss does: a weight may be of a row.
        weights = weights.reshape(*weights.shape, *[1] * (y.ndim - weights.ndim))
        y = y[np.broadcast_to(weights, y.shape) != 0]
    check_ids(y, vocabulary_size, "Labels `y` whose sample weight is not 0")


def preprocess_stream(batches, function):
    """A generator, for Keras takes no other iterator, of `function(batch)` for each of `batches`."""
    batch = None
    for batch in batches:
        yield function(batch)
    if batch is None:
        raise ValueError(NO_DATA)


class PreprocessedDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches pass through a function.

    Args:
        dataset: `keras.utils.PyDataset`.
        function: of a batch.
    """

    def __init__(self, dataset, function):
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
    """Counts the rows that a preprocessor cut, and warns of them: when `report` is called and on leaving the context.

    A batch counts once, however often Keras reads it; so do two equal batches. Rows that other processes read
    (`use_multiprocessing=True`) are not counted.
    """

    def __init__(self):
        self.counts = {}

    def count(self, rows, weights):
        """Take note of a batch.

        Args:
            rows: lists of ids, whole.
            weights: int [B, T], which labels are learnt of what is left of each row.
        """
        self.sequence_length = weights.shape[1]
        # The last label is one more token.
        is_cut = np.array([len(row) > self.sequence_length + 1 for row in rows])
        batch = hash(tuple(map(tuple, rows)))
        self.counts[batch] = (len(rows), is_cut.sum(), (is_cut & ~weights.any(axis=1)).sum())

    def report(self):
        """Warn, where rows were cut since the last report."""
        rows, cut, unanswered = (
            np.sum([*self.counts.values()], axis=0) if self.counts else (0, 0, 0)
        )
        self.counts = {}
        if cut:
            lost = (
                f"; of {unanswered} of them the whole answer was cut away, and they teach nothing"
            )
            warnings.warn(
                f"{cut} of {rows} rows were longer than sequence_length={self.sequence_length} and were cut"
                f"{lost if unanswered else ''}.",
                stacklevel=3,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.report()
