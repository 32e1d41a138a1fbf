"""The private training step: clip each row's or user's gradient, sum, add noise, update.

The step samples nothing itself. Which rows it gets and what its noise is seeded with are part of
the batch (`privacy/sampling.py`), so that a step is a function of the weights and its batch.

With `DPSGD(unit="user")` the records are users: what is clipped is the gradient of the mean loss of
a user's k rows, which are computed together. The mean, not the sum, because its gradient is no
longer for users with more rows, so that a clipping norm suits all of them and any k; and it is
shorter than that of a single row where the rows disagree, so that less of it is clipped away.
"""

import functools
import math

import keras
from keras import ops

from keras_vaultgemma import backend
from keras_vaultgemma.privacy import checks, mechanism
from keras_vaultgemma.privacy.device_sums import sum_of_devices
from keras_vaultgemma.privacy.row_losses import RowLosses

STATISTICS = ("loss", "clipped_share", "not_finite_rows")
"""Statistics of its rows, or users, that a step reports without protection."""


class PrivateTraining:
    """Private training of a model that is compiled with `privacy=DPSGD(...)`; its trainer holds it.

    Args:
        model: compiled `keras.Model`.
        settings: `DPSGD`.
        row_losses: `RowLosses` of the model. Defaults to those of its compiled loss.

    Attributes:
        metrics: list of metrics that `step` updates. None of them is protected by noise.
        microbatch: int. Rows, or users, that are computed together.
        capacity: int or None. Largest number of them that a batch may draw. None means that of the
            inputs.
        compiled_metrics: nested metrics that the user gave to `compile`.
    """

    def __init__(self, model, settings, row_losses=None):
        self.compiled_metrics = None
        self.model, self.settings = model, settings
        self.row_losses = RowLosses(model) if row_losses is None else row_losses
        self.metrics = [keras.metrics.Mean(name=checks.UNPROTECTED + name) for name in STATISTICS]
        self.microbatch, self.capacity, self._row_shapes = 1, None, None

    def prepare(self, rows, microbatch, capacity, rows_per_user=None):
        """Get ready for a run: set the sizes and build the metrics.

        Args:
            rows: nested arrays, the training data.
            microbatch: int. Rows, or users, that are computed together.
            capacity: int. Largest number of rows or users that a batch may draw.
            rows_per_user: int. k, if records are users. Defaults to None.
        """
        model = self.model
        shapes = [(rows_per_user, *array.shape[1:]) for array in keras.tree.flatten(rows)]
        sizes = microbatch, capacity, shapes
        if sizes != (self.microbatch, self.capacity, self._row_shapes):
            # The compiled step contains them; TensorFlow, given another shape, would retrace it
            # with an unknown one.
            self.microbatch, self.capacity, self._row_shapes = sizes
            model.train_function = None
        # Keras would build metrics from the first batch, whose structure is another one here.
        x, y, *weight = keras.tree.map_structure(
            lambda array: ops.convert_to_tensor(array[:1]), rows
        )
        predicted = y
        if model.loss is not None:
            predicted = model(x)
            model.compute_loss(x, y, predicted, *weight)
        model.compute_metrics(x, y, predicted, *weight)
        model.reset_metrics()

    def step(self, data):
        """Do one private step, and return logs.

        Args:
            data: batch of `PrivateBatches`.
        """
        x, y, step = data
        model = self.model
        inputs = (x, y, step["sample_weight"]) if "sample_weight" in step else (x, y)
        backend.seed_global_generator(step["layer_seeds"][0, 0, 0])
        names = ("drawn", "noise_seeds", "noise_multiplier", "expected_rows")
        drawn, noise_seeds, *factors = backend.one_of_equal([step[name] for name in names])
        clipped, states = self.clipped_sum(
            inputs, step["count"], step["layer_seeds"][:, 1:], step.get("is_drawn"), drawn
        )
        own = len(self.seeds)  # these stay as they are, whatever was drawn (privacy/seeds.py)
        for variable, value in zip(self._states[own:], states[own:], strict=True):
            variable.assign(value)
        gradients = mechanism.noised_mean(
            clipped, factors[0], noise_seeds, factors[1], self.settings.secure
        )
        model.optimizer.apply(gradients, model.trainable_variables)
        return self._report(clipped, drawn)

    def _report(self, clipped, count):
        used = ops.cast(count, "float32") - clipped.not_finite
        loss, share, not_finite = self.metrics
        loss.update_state(clipped.loss / ops.maximum(used, 1.0), used)
        share.update_state(clipped.clipped / ops.maximum(used, 1.0), used)
        not_finite.update_state(clipped.not_finite)
        # The model's results, too, because metrics of the user's own may be called unprotected.
        own = {metric.name: metric.result() for metric in self.metrics}
        results = {**self.model.get_metrics_result(), **own}
        return {
            name: value for name, value in results.items() if name.startswith(checks.UNPROTECTED)
        }

    @property
    def seeds(self):
        """Variables that are seeds of the model's random layers."""
        weights = {id(v) for v in self.model.weights}
        return [v for v in self.model.non_trainable_variables if id(v) not in weights]

    @property
    def _states(self):
        """Variables that computing a row may change: seeds of random layers, then metrics."""
        own = {id(v) for metric in self.metrics for v in metric.variables}
        return self.seeds + [v for v in self.model.metrics_variables if id(v) not in own]

    def clipped_sum(self, inputs, count, seeds=None, is_drawn=None, drawn=None):
        """Compute `mechanism.clipped_sum` of rows or users, on all D devices.

        Args:
            inputs: nested tensors, of which the first `count[d]` rows or users of each of D equal
                parts are a batch. A user has k consecutive rows.
            count: int32 tensor of shape `[D]`, or a scalar if D is 1.
            seeds: int32 tensor of shape `[D, S, 2]`: the values of `seeds` at the first row of each
                part. Defaults to their current values.
            is_drawn: bool tensor of shape `[users, k]`, as `RowLosses.user_losses` takes it.
                Defaults to None: the inputs are rows.
            drawn: int32 scalar. Sum of `count`, of which each device has its share, rounded up or
                down. Defaults to None, which takes communication to find the largest count.

        Returns:
            Tuple of the `ClippedSum` and the values of the states (seeds, then metrics) after it.
            States of several devices are not known together, and stay as they are.
        """
        devices, count = backend.data_devices(), ops.reshape(ops.convert_to_tensor(count), (-1,))
        variables = [*self.model.variables, *self.model.metrics_variables]
        values, states = ([backend.value_of(v) for v in vs] for vs in (variables, self._states))

        last = ops.max(count) if drawn is None else -(-drawn // devices)

        def on_device(divided, whole):
            inputs, is_drawn, count, seeds = divided
            values, states, last = whole
            now = list(zip(variables, values, strict=True))
            seeds = None if seeds is None else seeds[0]
            sums, after = self._device_sum(now, states, inputs, count[0], seeds, is_drawn, last)
            return sums, after if devices == 1 else []

        sums, after = sum_of_devices(
            on_device, (inputs, is_drawn, count, seeds), (values, states, last)
        )
        return sums, after if devices == 1 else states

    def _device_sum(self, now, start, inputs, count, seeds, is_drawn, last):
        """Compute `mechanism.clipped_sum` of the rows or users of one device.

        Args:
            now: list of pairs of a variable and its value: all variables of the model.
            start: list of tensors. Values of the states before the first row.
            last: int32 scalar. Largest `count` of all devices.
        """
        model = self.model
        trained, states = model.trainable_variables, self._states
        value_of = {id(variable): value for variable, value in now}
        values = [value_of[id(v)] for v in trained]
        per_record = 1 if is_drawn is None else is_drawn.shape[1]

        def row_gradients(start, length, before):
            def part(x, each=per_record):
                first = (start * each, *[0] * (len(x.shape) - 1))
                return ops.slice(x, first, (length * each, *x.shape[1:]))

            rows = keras.tree.map_structure(part, inputs)
            losses_of_rows = self.row_losses.losses
            if is_drawn is not None:
                losses_of_rows = functools.partial(self.row_losses.user_losses, part(is_drawn, 1))

            def losses_of(copies):
                with keras.StatelessScope(state_mapping=now) as scope:
                    # Not in the mapping, which takes values of the variables' own shapes alone.
                    for update in zip([*trained, *states], [*copies, *before], strict=True):
                        scope.add_update(update)
                    others = [v for v, _ in now if not any(v is state for state in states)]
                    fixed = [scope.get_current_value(v) for v in others]
                    total, losses = losses_of_rows(*rows)
                    for variable, value in zip(others, fixed, strict=True):
                        if scope.get_current_value(variable) is not value:
                            raise ValueError(
                                "Private training needs layers that store nothing about the rows. "
                                f"Received: {variable.path}, which the forward pass changes"
                            )
                    return total, (losses, [scope.get_current_value(v) for v in states])

            # Each row or user is computed with its own copy, whose gradient is theirs alone.
            copies = values
            if size > 1:
                copies = [ops.broadcast_to(x[None], (length, *x.shape)) for x in values]
            gradients, (losses, after) = backend.gradients(losses_of, copies)
            return [g if size > 1 else g[None] for g in gradients], losses, after

        start, shapes = list(start), [tuple(v.shape) for v in trained]
        for i, variable in enumerate([] if seeds is None else self.seeds):
            start[i] = ops.cast(seeds[i], variable.dtype)
        devices = backend.data_devices()
        # TensorFlow does not know the number of rows of a batch while it traces the step.
        part = keras.tree.flatten(inputs)[0]
        records = self.capacity or ops.shape(part)[0] // per_record * devices
        # A block of compiled length must fit into the inputs, even if no batch has one.
        size = min(self.microbatch, (part.shape[0] or math.inf) // per_record)
        static_lengths = model.jit_compile or not self.row_losses.takes_any_number
        return mechanism.clipped_sum(
            row_gradients,
            shapes,
            count,
            records,
            size,
            self.settings.clip_norm,
            start,
            devices,
            last,
            static_lengths,
        )
