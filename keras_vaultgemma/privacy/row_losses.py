"""Losses of single rows and users, whose gradients a private step clips."""

import keras
from keras import ops

from keras_vaultgemma import backend


class RowLosses:
    """Losses of single rows of a `keras.Model` with its compiled loss, one row at a time.

    Args:
        model: compiled `keras.Model`.

    Attributes:
        takes_row_variables: True if `losses` can compute R rows together, each with its own copy of
            the trainable variables. The layers must then accept variables with a leading axis for
            the rows, of shape `[R, *shape]`, so that a row's gradient is that of its copy. Other
            layers would mix the rows' gradients.
        takes_user_variables: True if `user_losses` can compute U users together in the same way,
            with variables of shape `[U, *shape]` for `U * k` rows.
        takes_any_number: True if this R or U need not be known while the step is compiled.
    """

    takes_row_variables = False
    takes_user_variables = False
    takes_any_number = False

    def __init__(self, model):
        self.model = model

    def rows_at_once(self, rows):
        """Return how many rows are best computed together, if `takes_row_variables`.

        Args:
            rows: nested arrays, the training data.
        """
        return 1

    def unit(self, rows, unit):
        """Describe what is protected, in words."""
        return f"one {unit}"

    def losses(self, x, y=None, sample_weight=None):
        """Compute the losses of R rows; R is 1 unless `takes_row_variables`.

        Returns:
            Tuple `(total, losses)` of a float32 scalar and a tensor of shape `[R]`. Each row's part
            of the total is a function of that row alone.
        """
        predicted = self.model(x, training=True)
        loss = self.model.compute_loss(x, y, predicted, sample_weight, training=True)
        self.model.compute_metrics(x, y, predicted, sample_weight)
        total = ops.cast(loss, "float32")
        return total, ops.reshape(total, (1,))

    def user_losses(self, is_drawn, x, y=None, sample_weight=None):
        """Compute the losses of U users; U is 1 unless `takes_user_variables`.

        A user's loss is the mean of the losses of those rows that are drawn and have a weight that
        is not 0.

        Args:
            is_drawn: bool tensor of shape `[U, k]`. False for rows that only fill the shape.
            x: nested tensors of shape `[U * k, ...]`.
            y: nested tensors of shape `[U * k, ...]`.
            sample_weight: tensor of shape `[U * k, ...]`, or None.

        Returns:
            Tuple `(total, losses)` of a float32 scalar and a tensor of shape `[U]`. Each user's
            part of the total is a function of that user's rows alone.
        """
        is_counted = ops.reshape(is_drawn, (-1,))
        if sample_weight is not None:
            has_weight = ops.reshape(sample_weight, (is_counted.shape[0], -1)) > 0
            is_counted = ops.logical_and(is_counted, ops.any(has_weight, axis=1))
        predicted = self.model(x, training=True)
        losses = []
        for i in range(is_counted.shape[0]):
            row = keras.tree.map_structure(
                lambda part, i=i: None if part is None else part[i : i + 1],
                (x, y, predicted, sample_weight),
            )
            # Keras averages over rows in ways that depend on the loss, but one row is its own mean.
            loss = self._loss_of_row(is_counted[i], *row)
            losses.append(ops.where(is_counted[i], ops.cast(loss, "float32"), 0.0))
        total = sum(losses) / ops.maximum(ops.sum(ops.cast(is_counted, "float32")), 1.0)
        return total, ops.reshape(total, (1,))

    def _loss_of_row(self, is_counted, x, y, predicted, sample_weight):
        """Return the compiled loss of a row, which enters the metrics only if it is counted."""
        variables = self.model.metrics_variables
        before = [backend.value_of(v) for v in variables]
        loss = self.model.compute_loss(x, y, predicted, sample_weight, training=True)
        self.model.compute_metrics(x, y, predicted, sample_weight)
        for variable, old in zip(variables, before, strict=True):
            new = backend.value_of(variable)
            if new is not old:
                variable.assign(ops.where(is_counted, new, old))
        return loss
