"""What fits a language model to data: compile, fit, evaluate, predict."""

import contextlib
import functools

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.data.fit_inputs import TruncationCounter, check_no_labels, prepare_fit_inputs
from keras_vaultgemma.data.text_inputs import as_samples
from keras_vaultgemma.lora import injection
from keras_vaultgemma.models.sharding import check_batches
from keras_vaultgemma.privacy.fit import private_fit
from keras_vaultgemma.privacy.train_step import PrivateTraining
from keras_vaultgemma.training.checkpoint import resumable
from keras_vaultgemma.training.loss import check_table
from keras_vaultgemma.training.scoring import Scoring

TOKENS_AT_ONCE = 2048
"""Of the rows that private training computes together."""


class FineTuning(Scoring, PrivateTraining):
    """The part of `VaultGemmaCausalLM` that trains; among its bases it stands before keras-hub's `CausalLM`.

    Between the backbone and the loss no logits are made: inside a training or test step the model returns hidden
    states, which the default loss takes (loss.py). A loss or metrics of the user's own are given logits.
    """

    _returns_hidden_states = False

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        sampler="greedy",
        gradient_checkpointing=False,
        privacy=None,
        **kwargs,
    ):
        """As `keras_hub.models.CausalLM.compile`, with other defaults.

        Args:
            loss: "auto" is cross-entropy averaged over the tokens that count, in nats, and computed without a
                [B, T, V] tensor of logits (loss.py). (Keras's own default divides by padding too, so that the same text
                has another loss in a longer row.)
            weighted_metrics: "auto" is the share of those tokens that the model ranks first. Metrics of your own are
                given logits, which then have to be computed and kept, as with a loss of your own.
            sampler: "greedy" unless given.
            gradient_checkpointing: keep only what enters each block for the backward pass and compute the rest again:
                a part of the memory, for about a quarter more time. Also has glibc return freed memory at once, in the
                whole process.
            privacy: `privacy.DPSGD`, which trains privately and states what that guarantees; None to train as ever.
        """
        is_auto = isinstance(loss, str) and loss == "auto"
        wants_accuracy = isinstance(weighted_metrics, str) and weighted_metrics == "auto"
        had_own_metrics = not getattr(self, "_loss_takes_hidden_states", True)
        self._loss_takes_hidden_states = (
            is_auto and not kwargs.get("metrics") and (wants_accuracy or not weighted_metrics)
        )
        self._reports_accuracy = self._loss_takes_hidden_states and wants_accuracy
        if not hasattr(self, "_accuracy"):
            self._accuracy = keras.metrics.Mean(name="sparse_categorical_accuracy")
        if self._loss_takes_hidden_states:
            # Keras would trace the model once more to build what is not used. None would keep the metrics of before.
            loss, weighted_metrics = None, [] if had_own_metrics else None
        elif is_auto:
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            )
        if privacy is not None and isinstance(weighted_metrics, str):
            weighted_metrics = None  # of the defaults none has the mark that it is not protected
        options = dict(weighted_metrics=weighted_metrics, sampler=sampler, privacy=privacy)
        super().compile(optimizer, loss, **options, **kwargs)
        self.backbone.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            backend.return_freed_memory()
            backend.return_memory_of_compilations()
        self._generators = {}

    @property
    def metrics(self):
        return [
            metric
            for metric in super().metrics
            if metric is not self._accuracy or self._reports_accuracy
        ]

    def call(self, inputs, training=None, mask=None):
        if self._returns_hidden_states:
            return self.backbone(inputs, training=training)
        return super().call(inputs, training=training, mask=mask)

    def train_step(self, *args, **kwargs):
        with self._in_step():
            return super().train_step(*args, **kwargs)

    def test_step(self, *args, **kwargs):
        with self._in_step():
            return super().test_step(*args, **kwargs)

    @contextlib.contextmanager
    def _in_step(self):
        """Inside, the model returns hidden states, if `compute_loss` takes those."""
        self._returns_hidden_states = self._loss_takes_hidden_states
        try:
            yield
        finally:
            self._returns_hidden_states = False

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not self._returns_hidden_states:
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)
        weights = (
            ops.ones(ops.shape(y), "float32")
            if sample_weight is None
            else ops.cast(sample_weight, "float32")
        )
        while len(weights.shape) < len(y.shape):
            weights = weights[..., None]
        weights = ops.reshape(ops.broadcast_to(weights, ops.shape(y)), (-1,))
        total, _, is_correct = self._cross_entropy(y_pred, ops.reshape(y, (-1,)), weights, training)
        self._accuracy.update_state(is_correct, weights)
        count = ops.sum(weights)
        mean = total / ops.where(count > 0, count, 1.0)
        return mean + sum(ops.sum(loss) for loss in self.losses)

    @property
    def privacy(self):
        return self.backbone.privacy

    @property
    def takes_row_variables(self):
        """With the default loss, where adapters of projections are all that is trained."""
        layers = injection.adaptable_layers(self.backbone).values()
        factors = [v for layer in layers if layer.takes_row_factors for v in layer.lora_factors]
        is_alone = {id(v) for v in self.trainable_variables} <= {id(v) for v in factors}
        return is_alone and self._loss_takes_hidden_states

    def rows_at_once(self, rows):
        return max(1, TOKENS_AT_ONCE // rows[0]["token_ids"].shape[1])

    def private_unit(self, rows, unit):
        return f"one {unit} of at most {rows[0]['token_ids'].shape[1]} tokens"

    def private_losses(self, x, y=None, sample_weight=None):
        """A row's loss is the mean over its tokens that count, each times its weight."""
        if not self._loss_takes_hidden_states:
            return super().private_losses(x, y, sample_weight)
        weights = (
            ops.ones(ops.shape(y), "float32")
            if sample_weight is None
            else ops.cast(sample_weight, "float32")
        )
        count = ops.sum(ops.cast(weights > 0, "float32"), axis=1, keepdims=True)
        weights = weights / ops.maximum(count, 1.0)
        hidden_states = self.backbone(x, training=True)
        flat = ops.reshape(weights, (-1,))
        total, losses, _ = self._cross_entropy(
            hidden_states, ops.reshape(y, (-1,)), flat, with_gradient=True
        )
        return total, ops.sum(ops.reshape(losses, ops.shape(weights)) * weights, axis=1)

    def preprocess_samples(self, x, y=None, sample_weight=None, truncations=None):
        """Raw samples to `(x, y, sample_weight)` for Keras; samples that are ids already pass unchanged."""
        if self.preprocessor is None or (isinstance(x, dict) and "token_ids" in x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        check_no_labels(y, sample_weight)
        # Past `Layer.__call__`, which looks into every string and wraps errors.
        return self.preprocessor.call(x, truncations=truncations)

    def fit(
        self, x=None, y=None, batch_size=None, sample_weight=None, validation_data=None, **kwargs
    ):
        """Train on next-token prediction; see `keras.Model.fit` for the arguments that are not explained here.

        Args:
            x: one of
                - strings;
                - `{"prompts": strings, "responses": strings}`: the loss is on the responses alone;
                - chats, lists of `{"role", "content"}`: the loss is on what the model says alone;
                - a `keras.utils.PyDataset`, generator or `tf.data.Dataset` of batches of one of these, or of packed
                  documents (packing.py);
                - `{"token_ids", "padding_mask"}` with labels `y`, of any value where `sample_weight` is 0.
            y, sample_weight: of ids alone; the other forms have their own.
            validation_data: like `x`, or a tuple `(x, y)` or `(x, y, sample_weight)`.

        Raises:
            ValueError: for empty data, items that are not strings, ids or labels outside the vocabulary, labels or
                weights beside data that have their own, 16-bit weights to train, or a batch that the distribution which
                is set cannot divide among its devices.

        Warns:
            UserWarning: how many rows were longer than the preprocessor's `sequence_length` and were cut: of data in
                memory before training, of streams after it.
        """
        self._check_that_training_moves_weights()
        self._check_that_there_is_a_loss()
        with TruncationCounter() as truncations:
            records = self._records(x)
            x, y, sample_weight = self._training_data(x, y, sample_weight, batch_size, truncations)
            rows = kwargs.get("validation_batch_size") or batch_size
            if isinstance(validation_data, tuple):
                validation_data = self._training_data(
                    *validation_data, batch_size=rows, truncations=truncations
                )
            elif validation_data is not None:
                x_val, y_val, weight_val = self._training_data(
                    validation_data, batch_size=rows, truncations=truncations
                )
                validation_data = x_val if y_val is None else (x_val, y_val, weight_val)
            truncations.report()
            if self.optimizer and not self.optimizer.built:
                # TensorFlow traces a step that makes variables twice: a second for each block, and 8 MB.
                self.optimizer.build(self.trainable_variables)
            kwargs |= dict(
                x=x,
                y=y,
                batch_size=batch_size,
                sample_weight=sample_weight,
                validation_data=validation_data,
            )
            with (
                private_fit(self, kwargs, records) as arguments,
                resumable(self, arguments) as arguments,
            ):
                # Past keras-hub's `fit`, which needs Grain or TensorFlow to slice arrays that Keras slices itself.
                return keras.Model.fit(self, **arguments)

    def _records(self, x):
        """The rows as the user gave them, for private training to know them again; None of ids and of streams."""
        if (
            self._dpsgd is None
            or self.preprocessor is None
            or hasattr(x, "__next__")
            or hasattr(x, "cardinality")
        ):
            return None
        batches = [x]
        if isinstance(x, keras.utils.PyDataset):
            batches = (x[i] for i in range(x.num_batches or 0))
            batches = (batch[0] if isinstance(batch, tuple) else batch for batch in batches)
        records = []
        for batch in batches:
            if isinstance(batch, dict) and "token_ids" in batch:
                return None
            records += ["\0".join(parts) for parts in as_samples(batch)[0]]
        return records

    def _check_that_there_is_a_loss(self):
        # Before Keras begins: on JAX an error within its step leaves the model without values.
        if self._loss_takes_hidden_states:
            check_table(self.backbone.token_embedding)

    def _check_that_training_moves_weights(self):
        for variable in self.trainable_variables:
            if variable.dtype in ("bfloat16", "float16"):
                raise ValueError(
                    "`fit` needs float32 weights to train, for Keras's Adam does not move 16-bit ones at all: load the "
                    'model with dtype="mixed_bfloat16" or dtype="float32", or call `backbone.enable_lora`, whose '
                    f"factors are float32. Received: {variable.path} of dtype {variable.dtype}"
                )

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        """Loss and metrics on data as for `fit`, with the same warning."""
        self._check_that_there_is_a_loss()
        with TruncationCounter() as truncations:
            x, y, sample_weight = self._training_data(x, y, sample_weight, batch_size, truncations)
            return keras.Model.evaluate(
                self, x=x, y=y, batch_size=batch_size, sample_weight=sample_weight, **kwargs
            )

    def predict(self, x, batch_size=None, **kwargs):
        """Logits, float32 [B, T, V], for data as for `fit`."""
        x, _, _ = self._training_data(x, batch_size=batch_size)
        return keras.Model.predict(self, x, batch_size=batch_size, **kwargs)

    def _training_data(self, x, y=None, sample_weight=None, batch_size=None, truncations=None):
        preprocess = (
            None
            if self.preprocessor is None
            else functools.partial(self.preprocess_samples, truncations=truncations)
        )
        # To a loss of the user's own labels may mean something else, such as classes to ignore.
        size, labels_are_ids = self.backbone.vocabulary_size, self._loss_takes_hidden_states
        data = prepare_fit_inputs(x, y, sample_weight, preprocess, size, labels_are_ids)
        check_batches(data[0], batch_size)
        return data
