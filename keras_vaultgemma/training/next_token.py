"""Training and test steps of a causal language model with the default loss.

The loss is the cross-entropy of the next token, averaged over the tokens that count. It is computed
from hidden states (`training/loss.py`), so that logits of shape [B, T, V] never exist.
"""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.training.scoring import token_losses


class NextTokenSteps:
    """Training and test steps for `Trainer.compile(steps=...)`.

    Args:
        model: causal language model with `hidden_states(inputs, training)` and
            `backbone.token_embedding`.
        reports_accuracy: bool. If True, also report the fraction of tokens that the model ranks
            first.

    Attributes:
        metrics: list of the metrics that Keras does not have already.
    """

    def __init__(self, model, reports_accuracy):
        self._model = model
        self.metrics = []
        if reports_accuracy:
            self.metrics.append(keras.metrics.Mean(name="sparse_categorical_accuracy"))

    def train(self, data):
        """Update the model by the gradient of the loss of a batch, and return logs."""
        model, optimizer = self._model, self._model.optimizer

        def scaled_loss():
            loss, statistics = self._loss(data, training=True)
            return optimizer.scale_loss(loss), (loss, statistics)

        gradients, (loss, statistics) = backend.loss_gradients(model, scaled_loss)
        optimizer.apply(gradients, model.trainable_variables)
        return self._report(data, loss, statistics)

    def test(self, data):
        """Evaluate a batch, and return logs."""
        return self._report(data, *self._loss(data, training=False))

    def loss_of_logits(self, y, y_pred, sample_weight=None):
        """Return the same loss for logits `y_pred` of shape `[B, T, V]`, as a scalar."""
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        )
        return loss(y, y_pred, sample_weight)

    def _loss(self, data, training):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        hidden_states = self._model.hidden_states(x, training=training)
        weights = flat_weights(y, sample_weight)
        total, _, is_correct = token_losses(
            self._model.backbone.token_embedding,
            hidden_states,
            ops.reshape(y, (-1,)),
            weights,
            with_gradient=training,
        )
        count = ops.sum(weights)
        mean = total / ops.where(count > 0, count, 1.0)
        added = sum(ops.sum(loss) for loss in self._model.losses)
        return mean + added, (is_correct, weights)

    def results(self):
        """Return `{name: value}` of the metrics so far."""
        return {metric.name: metric.result() for metric in (self._loss_tracker, *self.metrics)}

    @property
    def _loss_tracker(self):
        """Keras's metric of the loss."""
        return next(metric for metric in self._model.metrics if metric.name == "loss")

    def _report(self, data, loss, statistics):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        rows = ops.shape(keras.tree.flatten(x)[0])[0]
        self._loss_tracker.update_state(loss, sample_weight=rows)
        for metric in self.metrics:
            metric.update_state(*statistics)
        return self.results()


def flat_weights(y, sample_weight=None):
    """Return the weight of each label, float32 of shape `[B * T]`.

    Args:
        y: labels of shape `[B, T]`.
        sample_weight: weights of shape `[B]` or `[B, T]`, or None for 1.
    """
    if sample_weight is None:
        return ops.ones((ops.size(y),), "float32")
    weights = ops.cast(sample_weight, "float32")
    while len(weights.shape) < len(y.shape):
        weights = weights[..., None]
    return ops.reshape(ops.broadcast_to(weights, ops.shape(y)), (-1,))
