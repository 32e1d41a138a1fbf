"""Conversion of the data that users pass to `fit` into what Keras's data adapters take."""

import warnings

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.data.batch_checks import as_array, check_batch
from keras_vaultgemma.data.containers import as_plain
from keras_vaultgemma.data.streams import as_batches

EMPTY = "Data must have at least one batch. Received: none"


def prepare_fit_inputs(
    x,
    y,
    sample_weight,
    preprocess,
    vocabulary_size,
    labels_are_ids=True,
    needs_labels=False,
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
        preprocess: callable. Takes and returns a batch `(x, y, sample_weight)`. If None, batches
            are checked and passed on as they are.
        vocabulary_size: int. V, against which ids in arrays are checked.
        labels_are_ids: bool. If True, labels whose weight is not 0 are checked against V too.
            Defaults to `True`.
        needs_labels: bool, as for `check_batch`. Defaults to `False`.
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

    def check(x, y=None, sample_weight=None):
        check_batch(x, y, sample_weight, vocabulary_size, labels_are_ids, needs_labels)

    if isinstance(x, dict) and "token_ids" in x:
        x = {name: as_array(part, name) for name, part in x.items()}
        y, sample_weight = as_array(y, "y"), as_array(sample_weight, "sample_weight")
        if hasattr(x["token_ids"], "shape") and 0 in x["token_ids"].shape[:1]:
            raise ValueError(EMPTY)
        check(x, y, sample_weight)
        return x, y, sample_weight
    is_tf_data = backend.is_tensorflow(x) and hasattr(x, "cardinality")
    is_empty = isinstance(x, keras.utils.PyDataset) and x.num_batches == 0
    if is_empty or (is_tf_data and int(x.cardinality()) == 0):
        raise ValueError(EMPTY)
    is_stream = isinstance(x, keras.utils.PyDataset) or is_tf_data or hasattr(x, "__next__")
    if x is None or (preprocess is None and not is_stream):
        return x, y, sample_weight
    check_no_labels(y, sample_weight)
    preprocess = preprocess or keras.utils.pack_x_y_sample_weight

    def preprocess_batch(*batch):
        # `tf.data` unpacks a tuple into arguments; a PyDataset or generator passes the tuple.
        is_tuple = len(batch) == 1 and isinstance(batch[0], tuple)
        data = preprocess(*(batch[0] if is_tuple else batch))
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if isinstance(x, dict) and "token_ids" in x:
            check(x, y, sample_weight)
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


def drop_rows_without_labels(x, y, sample_weight):
    """Return `(x, y, sample_weight)` without the rows whose weights are all 0.

    Args:
        x: dict of arrays of shape `[B, T]`.
        y: array of shape `[B, T]`.
        sample_weight: array of shape `[B, T]`.

    Raises:
        ValueError: If no row is left.
    """
    has_label = sample_weight.any(axis=1)
    if not has_label.any():
        raise ValueError(
            "Data must have a row with a label to learn. Received: none in "
            f"{len(has_label)} rows of sequence_length={y.shape[1]}"
        )
    if has_label.all():
        return x, y, sample_weight
    return (
        {name: part[has_label] for name, part in x.items()},
        y[has_label],
        sample_weight[has_label],
    )


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

    @property
    def run_identity(self):
        """That of the dataset, by which a `TrainingCheckpoint` recognises it, if it has one."""
        return self.dataset.run_identity

    @property
    def run_identity_comparisons(self):
        return self.dataset.run_identity_comparisons

    def __getitem__(self, index):
        return self.function(self.dataset[index])

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


class TruncationCounter:
    """Count of the rows that a preprocessor truncates, and of those without a label.

    A context manager that warns on exit, and whenever `report` is called. A batch counts once,
    however often Keras reads it, and equal batches count as one. Rows that are read by other
    processes (`use_multiprocessing=True`) are not counted.
    """

    def __init__(self):
        self.counts = {}

    def count(self, rows, weights):
        """Count the rows of a batch.

        Args:
            rows: list of B lists of ints. Token ids before truncation.
            weights: int array of shape `[B, T]`. Sample weights of the labels after truncation.
        """
        self.sequence_length = weights.shape[1]
        # A row of T + 1 tokens fits, because its last token is only a label.
        is_truncated = np.array([len(row) > self.sequence_length + 1 for row in rows])
        batch = hash(tuple(map(tuple, rows)))
        self.counts[batch] = (len(rows), is_truncated.sum(), (~weights.any(axis=1)).sum())

    def report(self):
        """Warn if rows were truncated or have no label since the last call."""
        if not self.counts:
            return
        rows, truncated, without_label = np.sum([*self.counts.values()], axis=0)
        self.counts, sentences = {}, []
        if truncated:
            sentences.append(
                f"{truncated} of {rows} rows were longer than "
                f"sequence_length={self.sequence_length} and were truncated."
            )
        if without_label:
            sentences.append(
                f"{without_label} of {rows} rows have no label to learn and are left out."
            )
        if sentences:
            warnings.warn(" ".join(sentences), stacklevel=3)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.report()
