"""The data that users pass to the causal language model's `fit`, as Keras takes them."""

import functools

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.data.containers import is_stream
from keras_vaultgemma.data.fit_inputs import (
    check_no_labels,
    drop_rows_without_labels,
    prepare_fit_inputs,
)
from keras_vaultgemma.data.text_inputs import as_records
from keras_vaultgemma.data.token_ids import columns_in_use, first_columns
from keras_vaultgemma.models.sharding import check_batches
from keras_vaultgemma.privacy.sampling import as_rows


class TrainingData:
    """The part of `CausalLMTrainer` that preprocesses and checks data."""

    _labels_are_ids = True
    """False if a loss or a step of the user's own may give labels another meaning."""

    def preprocess_samples(self, x, y=None, sample_weight=None, truncations=None):
        """Return `(x, y, sample_weight)` for raw samples. Samples that are ids pass unchanged."""
        if self.preprocessor is None or (isinstance(x, dict) and "token_ids" in x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        check_no_labels(y, sample_weight)
        # Not `Layer.__call__`, which inspects every string and wraps errors.
        return self.preprocessor.call(x, truncations=truncations)

    def _arrays(
        self,
        x,
        y=None,
        sample_weight=None,
        batch_size=None,
        truncations=None,
        is_sampled=False,
        steps=None,
    ):
        """Preprocess and check data for Keras. Of sampled rows, a batch may have any number."""
        data = self._prepare(x, y, sample_weight, truncations, batch_size=batch_size, steps=steps)
        # Samples have their weights from the preprocessor.
        if sample_weight is None and isinstance(data[2], np.ndarray) and not is_sampled:
            data = drop_rows_without_labels(*data)
        if not is_sampled:
            check_batches(data[0], batch_size)
        return data

    def _columns(self, x, sample_weight):
        """Return how many columns of arrays enter the loss, or None for all.

        All in private training, where the length of the longest record would change how the
        gradients of the others are rounded, and for losses and metrics of the user's own.
        """
        masks = [x.get("padding_mask") if isinstance(x, dict) else None, sample_weight]
        masks = [mask for mask in masks if np.ndim(mask) == 2]
        is_plain = self.private_training is None and self._steps is not None
        if not masks or not is_plain or self._steps.takes_logits or backend.process_count() > 1:
            return None
        return columns_in_use(*masks) if all(isinstance(m, np.ndarray) for m in masks) else None

    def _validation_arrays(self, data, batch_size, truncations, steps):
        """Preprocess and check the argument `validation_data` of `fit`."""
        if data is None:
            return None
        parts = data if isinstance(data, tuple) else (data,)
        if not 1 <= len(parts) <= 3:
            raise ValueError(
                "`validation_data` must be data of the form of `x`, or a tuple (x, y) or "
                f"(x, y, sample_weight). Received: a tuple of {len(parts)}"
            )
        x, y, sample_weight = self._arrays(
            *parts, batch_size=batch_size, truncations=truncations, steps=steps
        )
        x, y, sample_weight = first_columns((x, y, sample_weight), self._columns(x, sample_weight))
        return x if y is None else (x, y, sample_weight)

    def _predict_inputs(self, x, batch_size, steps):
        """Preprocess and check data for `predict`."""
        x, _, _ = self._prepare(x, needs_labels=False, batch_size=batch_size, steps=steps)
        check_batches(x, batch_size)
        return x

    def _prepare(
        self,
        x,
        y=None,
        sample_weight=None,
        truncations=None,
        needs_labels=True,
        batch_size=None,
        steps=None,
    ):
        """Preprocess and check data, all rows of which are kept."""
        preprocess, needs_labels = None, needs_labels and self._labels_are_ids
        if self.preprocessor is not None:
            preprocess = functools.partial(self.preprocess_samples, truncations=truncations)
        return prepare_fit_inputs(
            x,
            y,
            sample_weight,
            preprocess,
            self.backbone.vocabulary_size,
            self._labels_are_ids,
            needs_labels,
            batch_size,
            steps,
        )

    def _records(self, x):
        """Return the training examples as the user gave them, by which private training recognises
        a dataset; None for token ids and streams."""
        if self.private_training is None or self.preprocessor is None:
            return None
        if is_stream(x):
            as_rows(x)  # Raises, before the stream is read.
        return as_records(x)
