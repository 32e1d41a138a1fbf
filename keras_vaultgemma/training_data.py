"""What users hand to `fit`, as what Keras's own data adapters take."""

import keras

from keras_vaultgemma import backend, ids
from keras_vaultgemma.preprocessor import as_texts


def prepare(x, y, sample_weight, preprocess, vocabulary_size):
    """Raw training data to `(x, y, sample_weight)`.

    Args:
        x: strings; a `keras.utils.PyDataset`, generator or `tf.data.Dataset` of batches of strings; or a dict of ids.
        y, sample_weight: labels and weights where `x` is a dict of ids, else None.
        preprocess: function of a batch `(x, y, sample_weight)` to the same, or None to pass everything on.
        vocabulary_size: ids in NumPy arrays are checked against it.

    Returns:
        `(x, y, sample_weight)`. Arrays are preprocessed at once, streams batch by batch as they are read.

    Raises:
        ValueError: for empty data, items that are not strings, or ids outside the vocabulary.
    """
    if isinstance(x, dict):
        if hasattr(x["token_ids"], "shape") and not backend.is_symbolic_tensorflow(x["token_ids"]):
            ids.check_range(keras.ops.convert_to_numpy(x["token_ids"]), vocabulary_size)
        return x, y, sample_weight
    if preprocess is None or x is None:
        return x, y, sample_weight

    def preprocess_batch(*batch):
        # A PyDataset or generator yields a tuple, `tf.data` spreads it.
        return preprocess(*(batch[0] if len(batch) == 1 and isinstance(batch[0], tuple) else batch))

    if isinstance(x, keras.utils.PyDataset):
        return PreprocessedDataset(x, preprocess_batch), None, None
    if backend.is_tensorflow(x) and hasattr(x, "map"):
        return x.map(preprocess_batch), None, None
    if hasattr(x, "__next__"):
        return map(preprocess_batch, x), None, None
    return preprocess(as_texts(x)[0])


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
