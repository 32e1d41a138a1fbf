"""Training and test steps of a causal language model with the default loss.

The loss is the cross-entropy of the next token, averaged over the tokens that count. It is computed
from hidden states (`training/loss.py`), so that logits of shape [B, T, V] never exist, unless
metrics need them.
"""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.training.accumulation import LabelAccumulation
from keras_vaultgemma.training.optimizers import accumulates
from keras_vaultgemma.training.scoring import token_losses


class NextTokenSteps:
    """Training and test steps for `Trainer.compile(steps=...)`.

    Args:
        model: causal language model with `hidden_states(inputs, training)`, `logits(hidden_states)`
            and `backbone.token_embedding`.
        optimizer: string or `keras.optimizers.Optimizer` that the model is compiled with.
        reports_accuracy: bool. If True, also report the fraction of tokens that the model ranks
            first.
        takes_logits: bool. If True, compute logits for the metrics that Keras has compiled.
            Defaults to False.

    Attributes:
        metrics: list of the metrics that Keras does not have already.
        accumulation: `LabelAccumulation`, or None if the optimizer does not accumulate gradients.
        takes_logits: bool. The argument.
    """

    def __init__(self, model, optimizer, reports_accuracy, takes_logits=False):
        self._model = model
        self.takes_logits, self._weighs_rows = takes_logits, False
        self._accuracy = keras.metrics.SparseCategoricalAccuracy() if reports_accuracy else None
        self.accumulation = LabelAccumulation(model) if accumulates(optimizer) else None
        self.metrics = [] if self._accuracy is None else [self._accuracy]
        if self.accumulation is not None:
            self.metrics.append(self.accumulation.labels)

    def weigh_rows(self):
        """Let rows count the same instead of labels, for a run that version 0.1.0 began."""
        self._weighs_rows = True
        if self.accumulation is not None:
            self.metrics.remove(self.accumulation.labels)
            self.accumulation = None

    def train(self, data):
        """Update the model by the gradient of the loss of a batch, and return logs."""
        model, accumulation = self._model, self.accumulation
        before = None if accumulation is None else backend.value_of(accumulation.labels.count)

        def scaled_loss():
            loss, statistics = self._loss(data, training=True)
            factor = 1.0
            if accumulation is not None:
                factor = accumulation.loss_factor(before, ops.sum(statistics[1]))
            return model.optimizer.scale_loss(factor * loss), (loss, statistics)

        gradients, (loss, statistics) = backend.loss_gradients(model, scaled_loss)
        logits = self._logits(statistics)  # before the update, which changes the head
        if accumulation is None:
            backend.apply_gradients(model.optimizer, gradients, model.trainable_variables)
        else:
            accumulation.apply(gradients, before, ops.sum(statistics[1]))
        return self._report(data, loss, statistics, logits)

    def test(self, data):
        """Evaluate a batch, and return logs."""
        loss, statistics = self._loss(data, training=False)
        return self._report(data, loss, statistics, self._logits(statistics))

    def results(self):
        """Return `{name: value}` of the metrics so far."""
        loss = next(metric for metric in self._model.metrics if metric.name == "loss")
        metrics = [loss] if self._accuracy is None else [loss, self._accuracy]
        return {metric.name: metric.result() for metric in metrics}

    def _loss(self, data, training):
        """Return the loss of a batch and `(is_correct, weights, hidden states or nothing)`."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        hidden_states = self._model.hidden_states(x, training=training)
        weights = flat_weights(y, label_weights(x, y, sample_weight))
        total, _, is_correct = token_losses(
            self._model.backbone.token_embedding,
            hidden_states,
            ops.reshape(y, (-1,)),
            weights,
            with_gradient=training,
        )
        count = ops.sum(weights)
        mean = total / ops.where(count != 0, count, 1.0)
        added = sum(ops.sum(loss) for loss in self._model.losses)
        return mean + added, (is_correct, weights, [hidden_states] if self.takes_logits else [])

    def _logits(self, statistics):
        """Return the logits that metrics of the user's own get, or None."""
        if not self.takes_logits:
            return None
        return ops.stop_gradient(self._model.logits(statistics[2][0]))

    def _report(self, data, loss, statistics, logits):
        """Update the metrics, in which each label counts the same, and return logs."""
        model, (is_correct, weights, _) = self._model, statistics
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        count = ops.shape(y)[0] if self._weighs_rows else ops.sum(weights)
        for metric in model.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=count)
        if logits is not None:
            return model.compute_metrics(x, y, logits, sample_weight)
        if self._accuracy is not None:
            # Not its own method, which takes logits.
            keras.metrics.Mean.update_state(self._accuracy, is_correct, weights)
        return self.results()


def mean_loss_of_logits(y, logits, sample_weight=None):
    """Return the default loss for logits of shape `[B, T, V]`, as a scalar."""
    weights = flat_weights(y, sample_weight)
    # A label of weight 0 may have any value.
    labels = ops.where(weights != 0, ops.reshape(ops.cast(y, "int32"), (-1,)), 0)
    losses = keras.losses.sparse_categorical_crossentropy(
        labels, ops.reshape(logits, (-1, logits.shape[-1])), from_logits=True
    )
    count = ops.sum(weights)
    return ops.sum(losses * weights) / ops.where(count != 0, count, 1.0)


def label_weights(x, y, sample_weight=None):
    """Return the weights of labels; without `sample_weight` those of all tokens but padding.

    Args:
        x: dict of `token_ids` and `padding_mask` of shape `[B, T]`, or anything else.
        y: labels of shape `[B, T]`.
        sample_weight: weights of shape `[B]` or `[B, T]`, or None.

    Returns:
        Weights, or None for 1: there is no mask.
    """
    if sample_weight is not None or not isinstance(x, dict) or "padding_mask" not in x:
        return sample_weight
    is_token = ops.cast(x["padding_mask"], "int32") != 0
    # The last token before padding has the label <pad>, which has the id 0.
    return ops.cast(ops.logical_and(is_token, ops.cast(y, "int32") != 0), "float32")


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
