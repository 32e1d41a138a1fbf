"""Gradient accumulation in which each label counts the same.

Keras's optimizers average the gradients of `gradient_accumulation_steps` batches with equal
weights. The loss of a batch is a mean over its labels, so that a label of a batch with few labels
would count more than in one large batch. Here the gradients are weighted by labels: before each
batch, what the optimizer has accumulated is multiplied by the share of the labels that it comes
from, and the batch's gradient by the batch's share. The average is then that of one large batch.
"""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.training.optimizers import accumulators, inner_optimizer


class AccumulatedLabels(keras.metrics.Metric):
    """Number of labels, or sum of their weights, since the last update of the weights.

    It is a metric because those are part of a training step's state on every backend, and of a
    `TrainingCheckpoint`. It is not reported, and not reset with the others.
    """

    def __init__(self):
        super().__init__(name="accumulated_labels")
        self.count = self.add_variable((), "zeros", dtype="float32", name="count")

    def update_state(self, *args, **kwargs):
        """Do nothing, because only `LabelAccumulation` counts."""

    def reset_state(self):
        """Do nothing: an update may come after the end of an epoch."""

    def result(self):
        return self.count


class LabelAccumulation:
    """Weights of the batches that an optimizer accumulates.

    Args:
        model: compiled `keras.Model` whose optimizer has `gradient_accumulation_steps`.

    Attributes:
        labels: `AccumulatedLabels`.
    """

    def __init__(self, model):
        self._model = model
        self.labels = AccumulatedLabels()

    def loss_factor(self, before, count):
        """Return the factor of the loss of a batch.

        Args:
            before: scalar. Labels that were accumulated before the batch.
            count: scalar. Labels of the batch.
        """
        # The optimizer divides the sum of the gradients by the number of batches.
        steps = inner_optimizer(self._model.optimizer).gradient_accumulation_steps
        return steps * _share(count, before + count)

    def apply(self, gradients, before, count):
        """Add gradients, those of the loss times `loss_factor`, and update the weights if due."""
        model, optimizer = self._model, self._model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            # It skips a batch whose gradients are not finite.
            is_finite = [ops.all(ops.isfinite(g)) for g in gradients if g is not None]
            count = ops.where(ops.all(ops.stack(is_finite)), count, 0.0)
        total = before + count
        for variable in accumulators(optimizer):
            variable.assign(variable * ops.cast(_share(before, total), variable.dtype))
        updates = optimizer.iterations
        backend.apply_gradients(optimizer, gradients, model.trainable_variables)
        self.labels.count.assign(ops.where(optimizer.iterations > updates, 0.0, total))

    def flush(self):
        """Update the weights by what is accumulated, as one large batch at the end of the data."""
        backend.update_variables(self._model)
        if float(ops.convert_to_numpy(self.labels.count)):
            backend.without_gradients(self._flush)()

    def _flush(self):
        optimizer, trained = self._model.optimizer, self._model.trainable_variables
        zeros = [ops.zeros(v.shape, v.dtype) for v in trained]
        updates = int(ops.convert_to_numpy(optimizer.iterations))
        while int(ops.convert_to_numpy(optimizer.iterations)) == updates:
            inner_optimizer(optimizer).apply(zeros, trained)
        self.labels.count.assign(0.0)


class FlushAtEpochEnd(keras.callbacks.Callback):
    """Callback that ends the accumulation with the epoch, before validation and other callbacks.

    Args:
        accumulation: `LabelAccumulation`.
    """

    def __init__(self, accumulation):
        super().__init__()
        self._accumulation = accumulation

    def on_test_begin(self, logs=None):
        self._accumulation.flush()

    def on_epoch_end(self, epoch, logs=None):
        self._accumulation.flush()


def _share(part, whole):
    return part / ops.where(whole > 0, whole, 1.0)
