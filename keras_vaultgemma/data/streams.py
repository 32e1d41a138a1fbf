"""Streams, which are data that can only be read in order, as batches for `fit` on every backend."""

import itertools
import threading
from collections.abc import Mapping

import keras

from keras_vaultgemma import backend
from keras_vaultgemma.data.containers import (
    CHATS,
    as_plain,
    is_missing,
    is_one_sample,
    is_stream,
    sample_columns,
)
from keras_vaultgemma.data.token_ids import check_rank

DEFAULT_BATCH_SIZE = 32
"""That of `keras.Model.fit`."""


def as_batches(x, batch_size=None, steps=None):
    """Return a stream in a form of which `fit` takes batches, and anything else unchanged.

    Args:
        x: data as for `fit`.
        batch_size: int. Number of samples of a batch, if the stream has single ones. Defaults to
            32.
        steps: int. Number of batches that are read in an epoch, which may go on in the next pass
            through the stream. Defaults to None, for one pass.

    Returns:
        A generator if `x` is an iterator, which can be read once; a `tf.data.Dataset` if it is one;
        a `Stream` if `x` can be read again; otherwise `x`.
    """
    batch_size = batch_size or DEFAULT_BATCH_SIZE
    if backend.is_tensorflow(x) and hasattr(x, "element_spec"):
        _check_spec(x.element_spec)
        return x.batch(batch_size) if _has_single_texts(x.element_spec) else x
    if not is_stream(x):
        return x
    if hasattr(x, "__next__"):
        return read_batches(x, batch_size)
    return Stream(x, batch_size, is_endless=steps is not None)


def read_batches(stream, batch_size):
    """Yield the batches of an iterable, and its single samples in batches.

    Args:
        stream: iterable of batches, of single samples, or of tuples for `keras.Model.fit`.
        batch_size: int. Number of samples of a batch.

    Yields:
        Batches, as `containers.as_plain` returns them.

    Raises:
        ValueError: If an element is missing or malformed. The message has its number.
    """
    samples = []
    for number, element in enumerate(stream):
        try:
            element = _as_element(element)
        except ValueError as error:
            raise ValueError(f"Element {number} of the data, counted from 0: {error}") from error
        if not is_one_sample(element):
            yield element
            continue
        samples.append(element)
        if len(samples) == batch_size:
            yield _join(samples)
            samples = []
    if samples:
        yield _join(samples)


class Stream(keras.utils.PyDataset):
    """The batches of an iterable that can be read again, in the order that it has.

    Where the iterable has no length, it is read once in advance to count the batches, because Keras
    would report the end of the first epoch as missing data.

    Args:
        source: iterable of batches, or of single samples.
        batch_size: int. Number of samples of a batch, if the iterable has single ones.
        is_endless: bool. If True, batches go on in the next pass when the iterable ends. Defaults
            to False.

    Attributes:
        source: the argument.
        is_stream: True, because batches cannot be read in another order.
    """

    is_stream = True

    def __init__(self, source, batch_size, is_endless=False):
        super().__init__()
        self.source, self._batch_size, self._is_endless = source, batch_size, is_endless
        # TensorFlow reads in another thread, in which a pass may go on when the next one begins.
        self._lock = threading.Lock()
        self._batches, self._position = None, 0
        self._count = None if is_endless else self._count_batches()

    @property
    def num_batches(self):
        return self._count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        with self._lock:
            if index == 0 or index < self._position or self._batches is None:
                self._batches, self._position = self._read(), 0
            batch = None
            while self._position <= index:
                batch = next(self._batches, None)
                self._position += 1
        if batch is None:
            raise ValueError(
                f"A {type(self.source).__name__} must have as many batches in each pass as in the "
                "first, and at least one; pass a list if it can be read only once. "
                f"Received: no batch {index}, counted from 0"
            )
        return batch

    def _read(self):
        is_empty = False
        while not is_empty:
            is_empty = True
            for batch in read_batches(self.source, self._batch_size):
                yield batch
                is_empty = not self._is_endless

    def _count_batches(self):
        try:
            length = len(self.source)
        except (AttributeError, NotImplementedError, TypeError):
            return sum(1 for _ in read_batches(self.source, self._batch_size))
        # The length is that in single samples, if the first element is one.
        first = [_as_element(element) for element in itertools.islice(self.source, 1)]
        return -(-length // self._batch_size) if any(map(is_one_sample, first)) else length


def _as_element(element):
    if is_missing(element):
        raise ValueError(f"Every sample must be a string, a pair or a chat. Received: {element!r}")
    is_sequence = isinstance(element, (list, tuple)) and len(element) > 0
    if is_sequence and isinstance(element[0], Mapping) and "token_ids" in element[0]:
        return tuple(element)  # A torch `DataLoader` makes lists of `(x, y, sample_weight)`.
    if isinstance(element, tuple) and is_sequence and not isinstance(element[0], (str, bytes)):
        return element
    # A tuple of strings is no batch, because Keras would take its second item for labels.
    return as_plain([element] if isinstance(element, tuple) else element)


def _join(samples):
    """Return single samples as a batch."""
    if not isinstance(samples[0], dict):
        return samples
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _check_spec(spec):
    """Raise ValueError for what a `tf.data.Dataset` has, before TensorFlow's graph wraps errors."""
    x, *labels = spec if isinstance(spec, tuple) else [spec]
    if isinstance(x, Mapping) and "token_ids" in x:
        check_rank(x["token_ids"])
        return
    if labels and getattr(labels[0], "dtype", None) == "string":
        raise ValueError(
            "Pairs in a `tf.data.Dataset` must be dicts of 'prompts' and 'responses', or of "
            f"'prompt' and 'completion'. Received: {spec}"
        )
    columns = sample_columns([*x]) if isinstance(x, Mapping) else None
    parts = [x] if columns is None else [x[column] for column in columns]
    if columns == CHATS or any(getattr(part, "dtype", None) != "string" for part in parts):
        raise ValueError(
            "A `tf.data.Dataset` must have texts or pairs as strings; pass chats in a list or as "
            f"rows. Received: {spec}"
        )


def _has_single_texts(spec):
    """Return True if elements of a `tf.data.Dataset` have strings without a batch axis."""
    return any(
        getattr(part, "dtype", None) == "string" and part.shape.rank == 0
        for part in keras.tree.flatten(spec)
    )
