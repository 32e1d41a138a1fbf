"""Training of the causal language model: compile, fit, evaluate and predict on text."""

from typing import Any

import keras
from keras import ops

from keras_vaultgemma.data.containers import as_plain, is_stream
from keras_vaultgemma.data.fit_inputs import TruncationCounter
from keras_vaultgemma.data.token_ids import first_columns
from keras_vaultgemma.generation.selection import GeneratorCache
from keras_vaultgemma.models.row_losses import NextTokenRowLosses
from keras_vaultgemma.models.trainer import Trainer
from keras_vaultgemma.models.training_checks import TrainingChecks
from keras_vaultgemma.models.training_data import TrainingData
from keras_vaultgemma.privacy.dpsgd import DPSGD
from keras_vaultgemma.privacy.row_losses import RowLosses
from keras_vaultgemma.privacy.train_step import PrivateTraining
from keras_vaultgemma.training.accumulation import FlushAtEpochEnd
from keras_vaultgemma.training.checkpoint import all_callbacks, resumes_version_0_1
from keras_vaultgemma.training.next_token import (
    NextTokenSteps,
    label_weights,
    mean_loss_of_logits,
)


class CausalLMTrainer(TrainingChecks, TrainingData, Trainer):
    """The part of `VaultGemmaCausalLM` that trains. It precedes keras-hub's `CausalLM`.

    With the default loss, no logits are computed between the backbone and the loss. Losses,
    metrics, steps and `compute_loss` of the user's own get logits, as in Keras.
    """

    def __init__(self, *args, **kwargs):
        self._generators = GeneratorCache()
        self._has_default_loss = self._had_keras_metrics = False
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
                so that a text has another loss in a longer row.) The loss of an epoch, of
                validation data and of batches that the optimizer accumulates
                (`gradient_accumulation_steps`) is this mean over all their tokens, whatever the
                batch size; what is accumulated when an epoch ends is applied then.
            weighted_metrics: list of metrics. "auto", the default, is the fraction of these tokens
                that the model ranks first. Metrics of your own get logits, which then have to be
                computed and stored, as with a loss of your own, or with `train_step`, `test_step`,
                `compute_loss` or `compute_metrics` of a subclass.
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
        has_own_metrics = kwargs.get("metrics") or (weighted_metrics and not reports_accuracy)
        takes_logits = bool(has_own_metrics) or self._overrides(
            "train_step", "test_step", "compute_metrics"
        )
        has_own_loss = not is_auto or self._overrides("compute_loss")
        steps = None
        if not has_own_loss and (privacy is None or not takes_logits):
            steps = NextTokenSteps(
                self, optimizer, reports_accuracy and not takes_logits, takes_logits
            )
        if steps is not None and not takes_logits:
            # None instead of [] would leave the metrics of an earlier `compile`.
            weighted_metrics = [] if self._had_keras_metrics else None
        if is_auto:
            # Keras would trace the model once more to build a loss, which private steps need.
            loss = None
        if is_auto and steps is None and privacy is not None:
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            )
        if privacy is not None and isinstance(weighted_metrics, str):
            weighted_metrics = None  # the default metric's name does not say that it is unprotected
        options = dict(weighted_metrics=weighted_metrics, sampler=sampler, privacy=privacy)
        super().compile(optimizer, loss, steps=steps, **options, **kwargs)
        self._has_default_loss = is_auto
        # For a loss of the user's own, labels may mean something else, such as classes to ignore.
        self._labels_are_ids = not has_own_loss and not self._overrides("train_step", "test_step")
        self._had_keras_metrics = steps is None or takes_logits
        self.backbone.gradient_checkpointing = gradient_checkpointing
        self._generators = GeneratorCache()

    def _overrides(self, *names):
        """Return True if one of these methods is a subclass's or was assigned to the instance."""
        methods = {name: getattr(getattr(self, name), "__func__", None) for name in names}
        return any(method is not _METHODS[name] for name, method in methods.items())

    def _make_private_training(self, settings):
        losses = RowLosses(self) if self._steps is None else NextTokenRowLosses(self)
        return PrivateTraining(self, settings, losses)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Return the loss for logits `y_pred`, like `keras.Model.compute_loss`."""
        if not self._has_default_loss:
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)
        sample_weight = label_weights(x, y, sample_weight)
        if self.private_training is not None:
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)
        loss = mean_loss_of_logits(y, y_pred, sample_weight)
        return loss + sum(ops.sum(added) for added in self.losses)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Update the metrics with logits `y_pred`, like `keras.Model.compute_metrics`."""
        if self._has_default_loss:
            sample_weight = label_weights(x, y, sample_weight)
        return super().compute_metrics(x, y, y_pred, sample_weight)

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

        With the default loss and metrics, columns that are padding in all rows of data in memory
        are left out, except in private training.

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
        self._begin_training(kwargs)
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
            validation_data = self._validation_arrays(
                validation_data,
                kwargs.get("validation_batch_size") or batch_size,
                truncations,
                kwargs.get("validation_steps"),
            )
            truncations.report()
            arguments = dict(
                x=x,
                y=y,
                batch_size=batch_size,
                sample_weight=sample_weight,
                validation_data=validation_data,
                groups=groups,
                **kwargs,
            )
            self._build_optimizer()
            self._prepare_steps(arguments)
            return self._fit(arguments, records, self._columns(x, sample_weight))

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
        self._begin_evaluation()
        with TruncationCounter() as truncations:
            x, y, sample_weight = self._arrays(
                x, y, sample_weight, batch_size, truncations, steps=kwargs.get("steps")
            )
            data = (x, y, sample_weight)
            x, y, sample_weight = first_columns(data, self._columns(x, sample_weight))
            options = dict(batch_size=batch_size, sample_weight=sample_weight, **kwargs)
            return keras.Model.evaluate(self, x=x, y=y, **options)

    def predict(self, x: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Return logits, float32 of shape `[B, T, V]`, for data of the forms that `fit` takes."""
        x = self._predict_inputs(x, batch_size, kwargs.get("steps"))
        return keras.Model.predict(self, x, batch_size=batch_size, **kwargs)

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """Train on one batch, like `keras.Model.train_on_batch`, of the forms that `fit` takes."""
        self._begin_training(kwargs)
        x, y, sample_weight = self._prepare(x, y, sample_weight)
        self._build_optimizer()
        return super().train_on_batch(x, y, sample_weight, **kwargs)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """Evaluate one batch, like `keras.Model.test_on_batch`, of the forms that `fit` takes."""
        self._begin_evaluation()
        x, y, sample_weight = self._prepare(x, y, sample_weight)
        return super().test_on_batch(x, y, sample_weight, **kwargs)

    def _prepare_steps(self, arguments):
        """Get the steps ready for a `fit`, whose dict of arguments may get one more callback."""
        if self._steps is None or self.private_training is not None:
            return
        if resumes_version_0_1(arguments):
            self._steps.weigh_rows()
            self.train_function = self.test_function = None
        if self._steps.accumulation is not None:
            flush = FlushAtEpochEnd(self._steps.accumulation)
            arguments["callbacks"] = [flush, *all_callbacks(arguments)]


_METHODS = {
    name: getattr(CausalLMTrainer, name)
    for name in ("compute_loss", "compute_metrics", "train_step", "test_step")
}
