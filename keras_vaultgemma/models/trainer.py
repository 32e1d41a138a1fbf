"""Training of a Keras model: with steps of its own, privately, and resumable after a kill."""

import keras

from keras_vaultgemma import backend
from keras_vaultgemma.privacy import checks
from keras_vaultgemma.privacy.fit import plain_fit, private_fit
from keras_vaultgemma.privacy.ledger_writer import PrivacyRecord
from keras_vaultgemma.privacy.train_step import PrivateTraining
from keras_vaultgemma.training.checkpoint import resumable
from keras_vaultgemma.training.optimizers import constants


class Trainer:
    """Mixin of a `keras.Model` that adds private training and `TrainingCheckpoint`.

    It precedes the Keras class among the bases. Without `privacy` and without a
    `TrainingCheckpoint`, everything is Keras's own.

    Attributes:
        private_training: `PrivateTraining` if the model is compiled with `privacy`, else None.
        optimizer_constants: dict. Hyperparameters of the optimizer at `compile`.
    """

    def __init__(self, *args, **kwargs):
        self.private_training = None
        self._steps = None
        super().__init__(*args, **kwargs)

    @property
    def privacy(self):
        """`PrivacyRecord` of the private data that the weights were trained on."""
        if not hasattr(self, "_privacy_record"):
            self._privacy_record = PrivacyRecord()
        return self._privacy_record

    def compile(self, *args, privacy=None, steps=None, **kwargs):
        """Configure the model for training, like `keras.Model.compile`.

        Args:
            privacy: `DPSGD`, which states the guarantee, or None to train without privacy. Defaults
                to None.
            steps: object that replaces Keras's training and test step, such as `NextTokenSteps`. It
                has `train(data)` and `test(data)`, which return logs, `results()`, `metrics`,
                `accumulation` and `takes_logits`. Defaults to None.

        Raises:
            ValueError: If private training does not support the optimizer, a layer or a metric.
        """
        self.private_training, self._steps = None, None
        try:
            super().compile(*args, **kwargs)
            metrics = kwargs.get("metrics"), kwargs.get("weighted_metrics")
            if privacy is not None:
                checks.check_model(self, metrics)
        except BaseException:
            self.compiled = False  # or `fit` would run half-configured, past the failed check
            raise
        self._steps = steps
        # As the script sets them: callbacks and checkpoints change the learning rate.
        self.optimizer_constants = constants(self.optimizer) if self.optimizer else {}
        if privacy is not None:
            self.private_training = self._make_private_training(privacy)
            self.private_training.compiled_metrics = metrics

    def _make_private_training(self, settings):
        return PrivateTraining(self, settings)

    @property
    def metrics(self):
        holders = [self._steps, self.private_training]
        own = [metric for holder in holders if holder is not None for metric in holder.metrics]
        return [*super().metrics, *own]

    def get_metrics_result(self):
        if self._steps is not None and not self._steps.takes_logits:
            return self._steps.results()
        # The metrics of private steps are reported by these steps alone.
        hidden = [] if self.private_training is None else [*self.private_training.metrics]
        if self._steps is not None and self._steps.accumulation is not None:
            hidden.append(self._steps.accumulation.labels)
        names = {metric.name for metric in hidden}
        results = super().get_metrics_result()
        return {name: value for name, value in results.items() if name not in names}

    def train_step(self, *args, **kwargs):
        if self.private_training is not None:
            return backend.train_step(self, self.private_training.step, *args)
        if self._steps is not None:
            return backend.train_step(self, self._steps.train, *args)
        return super().train_step(*args, **kwargs)

    def test_step(self, *args, **kwargs):
        if self._steps is not None:
            return backend.test_step(self, self._steps.test, *args)
        return super().test_step(*args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        if self.private_training is not None:
            raise ValueError(
                "Private training samples its batches itself, in `fit`. "
                "Received: a batch to train on"
            )
        with plain_fit(self, {}):
            return super().train_on_batch(*args, **kwargs)

    def fit(self, x=None, y=None, **arguments):
        """Train the model, like `keras.Model.fit`.

        In private training `batch_size` is the expected number of rows in a batch, or of users with
        `DPSGD(unit="user")`, which needs another argument: `groups`, the label of each row's user.

        Raises:
            ValueError: If private training does not support the data or an argument, or a budget is
                used up.
        """
        return self._fit({**arguments, "x": x, "y": y})

    def _fit(self, arguments, records=None, columns=None):
        """Run `keras.Model.fit`, privately if so compiled, and resumably if asked to.

        Args:
            arguments: dict of arguments of `keras.Model.fit`.
            records: list of strings or bytes, the training examples before preprocessing, or None.
            columns: int. Number of columns of arrays to train on, or None for all.
        """
        if self.private_training is None:
            checks.check_groups(arguments.pop("groups", None), unit=None)
            run = plain_fit(self, arguments)
        else:
            run = private_fit(self.private_training, arguments, records)
        with run as arguments, resumable(self, arguments, columns) as arguments:
            # Not keras-hub's `fit`, which needs Grain or TensorFlow to slice arrays that Keras
            # slices itself.
            return keras.Model.fit(self, **arguments)
