"""Private training inside Keras's `fit`: a step that draws nothing itself, clips, sums, noises and updates."""

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.privacy import checks, mechanism
from keras_vaultgemma.privacy.fit import private_fit
from keras_vaultgemma.privacy.ledger_writer import PrivacyRecord
from keras_vaultgemma.training.checkpoint import resumable


class PrivateTraining:
    """The part of a `keras.Model` that trains privately, once it is compiled with `privacy=DPSGD(...)`.

    Stands before Keras's class among the bases. Without `privacy` everything is Keras's own.

    A model may say that it computes several rows each with variables of its own (`takes_row_variables`), how many pay
    off (`rows_at_once`) and what their losses are (`private_losses`). As it is here, a row is a batch of its own with
    the compiled loss.
    """

    _dpsgd = None
    _microbatch, _row_shapes = 1, None
    _unprotected = ()

    @property
    def privacy(self):
        """`PrivacyRecord` of the weights."""
        if not hasattr(self, "_privacy_record"):
            self._privacy_record = PrivacyRecord()
        return self._privacy_record

    def compile(self, *args, privacy=None, **kwargs):
        """As `keras.Model.compile`.

        Args:
            privacy: `DPSGD`, which states the guarantee, or None to train as ever. With it, on JAX, glibc returns what
                long compilations freed, in the whole process.

        Raises:
            ValueError: for an optimizer, layer or metric that private training refuses.
        """
        if not self._unprotected:
            names = ("loss", "clipped_share", "not_finite_rows")
            self._unprotected = [
                keras.metrics.Mean(name=checks.UNPROTECTED + name) for name in names
            ]
        try:
            super().compile(*args, **kwargs)
            if privacy is not None:
                checks.check_model(self, (kwargs.get("metrics"), kwargs.get("weighted_metrics")))
                backend.return_memory_of_compilations()
        except BaseException:
            self.compiled = (
                False  # else `fit` would go on with half of it, and without what was refused
            )
            raise
        self._dpsgd = privacy

    @property
    def metrics(self):
        own = {id(metric) for metric in self._unprotected}
        return [metric for metric in super().metrics if self._dpsgd or id(metric) not in own]

    def get_metrics_result(self):
        own = {metric.name for metric in self._unprotected}
        return {
            name: value for name, value in super().get_metrics_result().items() if name not in own
        }

    def fit(self, x=None, y=None, **arguments):
        """As `keras.Model.fit`; in private training `batch_size` is the expected one.

        Raises:
            ValueError: for data and arguments that private training refuses, or a budget that is used up.
        """
        arguments |= {"x": x, "y": y}
        with private_fit(self, arguments) as arguments, resumable(self, arguments) as arguments:
            return super().fit(**arguments)

    def train_on_batch(self, *args, **kwargs):
        if self._dpsgd:
            raise ValueError(
                "Private training draws its batches itself, in `fit`. Received: a batch to train on"
            )
        return super().train_on_batch(*args, **kwargs)

    def train_step(self, *args, **kwargs):
        if not self._dpsgd:
            return super().train_step(*args, **kwargs)
        return backend.train_step(self, self._private_step, *args)

    @property
    def takes_row_variables(self):
        """Whether `private_losses` can compute R rows, each with a copy of the trainable variables of its own.

        True needs layers that take variables with a first axis for the rows, of [R, *shape]: a row's gradient is that
        of its copy. Any other layer would give every copy a part of every row.
        """
        return False

    def rows_at_once(self, rows):
        """How many rows pay off to be computed together, where the model `takes_row_variables`.

        Args:
            rows: training data, nested arrays.
        """
        return 1

    def private_losses(self, x, y=None, sample_weight=None):
        """The losses of some rows.

        Args:
            x, y, sample_weight: R rows; R is 1 unless the model `takes_row_variables`.

        Returns:
            `(total, losses)`, float32 scalar and [R]. Each row's part of the total is a function of the row alone.
        """
        predicted = self(x, training=True)
        total = ops.cast(
            self.compute_loss(x, y, predicted, sample_weight, training=True), "float32"
        )
        self.compute_metrics(x, y, predicted, sample_weight)
        return total, ops.reshape(total, (1,))

    def private_unit(self, rows, unit):
        """What is protected, in words."""
        return f"one {unit}"

    def _private_step(self, data):
        x, y, step = data
        inputs = (x, y, step["sample_weight"]) if "sample_weight" in step else (x, y)
        backend.seed_global_generator(step["layer_seeds"][0, 0])
        clipped, states = self._clipped_sum(inputs, step["count"][0], step["layer_seeds"][1:])
        own = len(self._seeds)  # which stay as they are, whatever was drawn (noise_seeds.py)
        for variable, value in zip(self._states[own:], states[own:], strict=True):
            variable.assign(value)
        multiplier, expected = step["noise_multiplier"][0], step["expected_rows"][0]
        gradients = mechanism.noised_mean(clipped, multiplier, step["noise_seeds"], expected)
        self.optimizer.apply(gradients, self.trainable_variables)
        count = ops.cast(step["count"][0], "float32")
        used = count - clipped.not_finite
        loss, share, not_finite = self._unprotected
        loss.update_state(clipped.loss / ops.maximum(used, 1.0), used)
        share.update_state(clipped.clipped / ops.maximum(used, 1.0), used)
        not_finite.update_state(clipped.not_finite)
        told = super().get_metrics_result().items()
        return {name: value for name, value in told if name.startswith(checks.UNPROTECTED)}

    @property
    def _seeds(self):
        """Variables that are seeds of random layers."""
        weights = {id(v) for v in self.weights}
        return [v for v in self.non_trainable_variables if id(v) not in weights]

    @property
    def _states(self):
        """Variables that computing a row may change: seeds of random layers, then metrics."""
        own = {id(v) for m in self._unprotected for v in m.variables}
        return self._seeds + [v for v in self.metrics_variables if id(v) not in own]

    def _clipped_sum(self, inputs, count, seeds=None):
        """`mechanism.clipped_sum` of rows, and the values of `_states` after it.

        Args:
            inputs: nested tensors, of which the first `count` rows are a batch.
            count: int32 scalar.
            seeds: int32 [S, 2], what `_seeds` are at the first row; what they are now if None.
        """
        size, trained, states = self._microbatch, self.trainable_variables, self._states
        now = [(v, backend.value_of(v)) for v in [*self.variables, *self.metrics_variables]]
        values = [backend.value_of(v) for v in trained]
        # Each row is computed with a copy of its own, whose gradient is the row's alone.
        copies = (
            values if size == 1 else [ops.broadcast_to(x[None], (size, *x.shape)) for x in values]
        )

        def row_gradients(start, before):
            def part(x):
                return ops.slice(x, (start, *[0] * (len(x.shape) - 1)), (size, *x.shape[1:]))

            rows = keras.tree.map_structure(part, inputs)

            def losses_of(copies):
                with keras.StatelessScope(state_mapping=now) as scope:
                    # Not in the mapping, which takes values of the variables' own shapes alone.
                    for variable, value in [
                        *zip(trained, copies, strict=True),
                        *zip(states, before, strict=True),
                    ]:
                        scope.add_update((variable, value))
                    others = [v for v, _ in now if not any(v is state for state in states)]
                    fixed = [scope.get_current_value(v) for v in others]
                    total, losses = self.private_losses(*rows)
                    for variable, value in zip(others, fixed, strict=True):
                        if scope.get_current_value(variable) is not value:
                            raise ValueError(
                                "Private training needs layers that remember nothing of the rows. Received: "
                                f"{variable.path}, which the model changes while it computes"
                            )
                    return total, (losses, [scope.get_current_value(v) for v in states])

            gradients, (losses, after) = backend.gradients(
                losses_of, copies, jit_compile=bool(self.jit_compile)
            )
            return [g if size > 1 else g[None] for g in gradients], losses, after

        start, shapes = [backend.value_of(v) for v in states], [tuple(v.shape) for v in trained]
        for i, variable in enumerate([] if seeds is None else self._seeds):
            start[i] = ops.cast(seeds[i], variable.dtype)
        rows = ops.shape(keras.tree.flatten(inputs)[0])[0]
        return mechanism.clipped_sum(
            row_gradients, shapes, count, rows, size, self._dpsgd.clip_norm, start
        )
