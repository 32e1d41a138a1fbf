"""Training of the causal language model: compile, fit, evaluate and predict on text."""

import functools
from typing import Any

import keras
from keras import ops

from keras_vaultgemma.data.containers import as_plain, is_stream
from keras_vaultgemma.data.fit_inputs import TruncationCounter, check_no_labels, prepare_fit_inputs
from keras_vaultgemma.data.text_inputs import as_records
from keras_vaultgemma.models.row_losses import NextTokenRowLosses
from keras_vaultgemma.models.sharding import check_batches
from keras_vaultgemma.models.trainer import Trainer
from keras_vaultgemma.privacy.dpsgd import DPSGD
from keras_vaultgemma.privacy.sampling import as_rows
from keras_vaultgemma.privacy.train_step import PrivateTraining, RowLosses
from keras_vaultgemma.training.loss import check_table
from keras_vaultgemma.training.next_token import NextTokenSteps


class CausalLMTrainer(Trainer):
    """The part of `VaultGemmaCausalLM` that trains. It precedes keras-hub's `CausalLM`.

    With the default loss, no logits are computed between the backbone and the loss. A loss or
    metrics of the user's own get logits, as in Keras.
    """

    def __init__(self, *args, **kwargs):
        self._generators = {}
        self._had_keras_metrics = False
        super().__init__(*args, **kwargs)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        sampler: Any = "greedy",
        gradient_checkpointing: bool = False,
        privacy: DPSGD | None = None,
        **kwargs: Any,
    ) -> None:
        """Configure the model for training and generation, like `keras_hub.models.CausalLM`.

        Args:
            optimizer: string or `keras.optimizers.Optimizer`. Defaults to "auto", keras-hub's.
            loss: string or `keras.losses.Loss`. "auto", the default, is the cross-entropy of the
                next token in nats, averaged over the tokens that count, and computed in chunks so
                that logits of shape `[B, T, V]` never exist. (Keras's average also counts padding,
                so that a text has another loss in a longer row.)
            weighted_metrics: list of metrics. "auto", the default, is the fraction of these tokens
                that the model ranks first. Metrics of your own get logits, which then have to be
                computed and stored, as with a loss of your own.
            sampler: string or `keras_hub.samplers.Sampler`. Defaults to "greedy".
            gradient_checkpointing: bool. If True, save only each block's input for the backward
                pass and recompute the rest: a fraction of the memory, for about a quarter more time
                per step. With glibc, setting `MALLOC_MMAP_THRESHOLD_=1048576` in the environment
                also returns freed memory to the system, which otherwise fragments. Defaults to
                False.
            privacy: `DPSGD`, which trains with differential privacy and states the guarantee, or
                None. Defaults to None.
            **kwargs: Other arguments of `keras.Model.compile`. On PyTorch, `jit_compile=True` does
                not compile steps with the default loss, which take their gradients themselves.

        Raises:
            ValueError: If private training does not support the optimizer, a layer or a metric.

        Example:

        ```python
        import keras
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        model.compile(keras.optimizers.Adam(1e-4), sampler="top_k", gradient_checkpointing=True)
        ```
        """
        is_auto = isinstance(loss, str) and loss == "auto"
        reports_accuracy = isinstance(weighted_metrics, str) and weighted_metrics == "auto"
        takes_logits = (
            not is_auto
            or kwargs.get("metrics")
            or (weighted_metrics and not reports_accuracy)
            or self._has_own_steps()
        )
        steps = None if takes_logits else NextTokenSteps(self, reports_accuracy)
        if steps is not None:
            # Without a loss, because Keras would trace the model once more to build it. None
            # instead of [] would leave the metrics of an earlier `compile`.
            loss, weighted_metrics = None, [] if self._had_keras_metrics else None
        elif is_auto:
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            )
        if privacy is not None and isinstance(weighted_metrics, str):
            weighted_metrics = None  # the default metric's name does not say that it is unprotected
        options = dict(weighted_metrics=weighted_metrics, sampler=sampler, privacy=privacy)
        super().compile(optimizer, loss, steps=steps, **options, **kwargs)
        self._had_keras_metrics = steps is None
        self.backbone.gradient_checkpointing = gradient_checkpointing
        self._generators = {}

    def _has_own_steps(self):
        """Return True if a subclass overrides how Keras trains, which is with logits."""
        names = ("compute_loss", "compute_metrics", "train_step", "test_step")
        return any(getattr(type(self), name) is not _METHODS[name] for name in names)

    def _make_private_training(self, settings):
        losses = RowLosses(self) if self._steps is None else NextTokenRowLosses(self)
        return PrivateTraining(self, settings, losses)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Return the loss for logits `y_pred`, like `keras.Model.compute_loss`."""
        if self._steps is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)
        added = sum(ops.sum(loss) for loss in self.losses)
        return self._steps.loss_of_logits(y, y_pred, sample_weight) + added

    def preprocess_samples(self, x, y=None, sample_weight=None, truncations=None):
        """Return `(x, y, sample_weight)` for raw samples. Samples that are ids pass unchanged."""
        if self.preprocessor is None or (isinstance(x, dict) and "token_ids" in x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        check_no_labels(y, sample_weight)
        # Not `Layer.__call__`, which inspects every string and wraps errors.
        return self.preprocessor.call(x, truncations=truncations)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        groups: Any = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Train on next-token prediction, like `keras.Model.fit`.

        Args:
            x: One of

                - strings;
                - `{"prompts": strings, "responses": strings}`: the responses are trained on;
                - chats, lists of `{"role", "content"}`: the model's messages are trained on;
                - a column or table of these, such as a pandas or Hugging Face one or a list of
                  rows, with the columns that `VaultGemmaCausalLMPreprocessor` names;
                - a `keras.utils.PyDataset` of batches of one of these, or a `PackedDataset`;
                - a stream of batches or single samples, such as a generator, a torch `DataLoader`
                  (of chats with `collate_fn=list`), a Grain dataset or a `tf.data.Dataset`, in its
                  own order. Without a length or `steps_per_epoch` it is read once more, to count
                  its batches. Private training takes no streams;
                - `{"token_ids", "padding_mask"}` with labels `y`, which may have any value where
                  `sample_weight` is 0.
            y: labels for token ids. The other forms have their own.
            batch_size: int. Rows of a batch; in private training their expected number, or that of
                users with `DPSGD(unit="user")`. Defaults to 32.
            sample_weight: weights of the labels of token ids.
            validation_data: data of the form of `x`, or a tuple `(x, y)` or
                `(x, y, sample_weight)`.
            groups: list or array of strings or integers with one label per row, in the order of the
                rows: the person whose row it is. Only for private training with
                `DPSGD(unit="user")`, which needs it. Defaults to None.
            **kwargs: Other arguments of `keras.Model.fit`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: If the data is empty, an item is not a string, an id or label is outside the
                vocabulary, there are labels or weights next to data that has its own, the weights
                to train have 16 bits, or the current distribution cannot shard a batch.

        Warns:
            UserWarning: How many rows were longer than the preprocessor's `sequence_length` and
                were truncated: before training for data in memory, after it for streams.

        Example:

        ```python
        import keras
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        model.backbone.enable_lora(rank=4)
        model.compile(keras.optimizers.Adam(1e-3))
        prompts, responses = ["Who won?", "Who slept?"], [" The tortoise.", " The hare."]
        model.fit({"prompts": prompts, "responses": responses}, batch_size=2, verbose=0)
        ```
        """
        self._check_trainable_dtypes()
        self._check_default_loss()
        with TruncationCounter() as truncations:
            if self.preprocessor is not None:
                x = as_plain(x)
            records = self._records(x)
            is_sampled = self.private_training is not None
            steps = kwargs.get("steps_per_epoch")
            x, y, sample_weight = self._arrays(
                x, y, sample_weight, batch_size, truncations, is_sampled, steps
            )
            if getattr(x, "is_stream", is_stream(x)) and not is_sampled:
                kwargs["shuffle"] = False  # Keras would warn that it does not.
            options = dict(
                batch_size=kwargs.get("validation_batch_size") or batch_size,
                truncations=truncations,
                steps=kwargs.get("validation_steps"),
            )
            if isinstance(validation_data, tuple):
                validation_data = self._arrays(*validation_data, **options)
            elif validation_data is not None:
                x_val, y_val, weight_val = self._arrays(validation_data, **options)
                validation_data = x_val if y_val is None else (x_val, y_val, weight_val)
            truncations.report()
            if self.optimizer and not self.optimizer.built:
                # TensorFlow traces a step that creates variables twice: a second for each block.
                self.optimizer.build(self.trainable_variables)
            arguments = dict(
                x=x,
                y=y,
                batch_size=batch_size,
                sample_weight=sample_weight,
                validation_data=validation_data,
                groups=groups,
                **kwargs,
            )
            return self._fit(arguments, records)

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return loss and metrics on data of the forms that `fit` takes.

        Args:
            x: data, as for `fit`.
            y: labels for token ids.
            batch_size: int. Rows of a batch. Defaults to 32.
            sample_weight: weights of the labels of token ids.
            **kwargs: Other arguments of `keras.Model.evaluate`.

        Example:

        ```python
        from keras_vaultgemma import VaultGemmaCausalLM

        model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
        logs = model.evaluate(["The fox said no."], verbose=0, return_dict=True)
        ```
        """
        self._check_default_loss()
        with TruncationCounter() as truncations:
            x, y, sample_weight = self._arrays(
                x, y, sample_weight, batch_size, truncations, steps=kwargs.get("steps")
            )
            options = dict(batch_size=batch_size, sample_weight=sample_weight, **kwargs)
            return keras.Model.evaluate(self, x=x, y=y, **options)

    def predict(self, x: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Return logits, float32 of shape `[B, T, V]`, for data of the forms that `fit` takes."""
        x, _, _ = self._arrays(x, batch_size=batch_size, steps=kwargs.get("steps"))
        return keras.Model.predict(self, x, batch_size=batch_size, **kwargs)

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
        preprocess = None
        if self.preprocessor is not None:
            preprocess = functools.partial(self.preprocess_samples, truncations=truncations)
        # For a loss of the user's own, labels may mean something else, such as classes to ignore.
        size, labels_are_ids = self.backbone.vocabulary_size, self._steps is not None
        data = prepare_fit_inputs(
            x, y, sample_weight, preprocess, size, labels_are_ids, batch_size, steps
        )
        if not is_sampled:
            check_batches(data[0], batch_size)
        return data

    def _records(self, x):
        """Return the training examples as the user gave them, by which private training recognises
        a dataset; None for token ids and streams."""
        if self.private_training is None or self.preprocessor is None:
            return None
        if is_stream(x):
            as_rows(x)  # Raises, before the stream is read.
        return as_records(x)

    def _check_default_loss(self):
        # Before Keras begins, because on JAX an error inside its step leaves the model without
        # values.
        if self._steps is not None:
            check_table(self.backbone.token_embedding)

    def _check_trainable_dtypes(self):
        for variable in self.trainable_variables:
            if variable.dtype in ("bfloat16", "float16"):
                raise ValueError(
                    "`fit` needs float32 weights to train, because Keras's Adam does not move "
                    '16-bit ones at all: load the model with dtype="mixed_bfloat16" or '
                    'dtype="float32", or call `backbone.enable_lora`, whose factors are float32. '
                    f"Received: {variable.path} of dtype {variable.dtype}"
                )


_METHODS = {
    name: getattr(CausalLMTrainer, name) for name in ("compute_loss", "train_step", "test_step")
} | {"compute_metrics": keras.Model.compute_metrics}
