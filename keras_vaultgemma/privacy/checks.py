"""Checks of models, data and arguments that private training rejects, before a step is done.

Each check guards an assumption of the privacy proof (`mechanism`, `accounting`) or the rule that
only protected values leave the training.
"""

import warnings

import keras
import numpy as np

from keras_vaultgemma import backend
from keras_vaultgemma.privacy.statements import is_of_users
from keras_vaultgemma.training.checkpoint import all_callbacks, checkpoint_of

UNPROTECTED = "unprotected_"
"""Prefix of the names of metrics on private records, which no noise protects."""


def check_model(model, metrics):
    """Raise ValueError if a compiled model cannot be trained privately.

    `fit` checks again what can be set after `compile`.

    Args:
        model: compiled `keras.Model`.
        metrics: nested structure of the arguments `metrics` and `weighted_metrics` of `compile`.
    """
    optimizer = model.optimizer
    if getattr(optimizer, "gradient_accumulation_steps", None):
        raise ValueError(
            "Private training needs an optimizer without `gradient_accumulation_steps`, because "
            "the sum of independently drawn batches has a larger ε than one batch of their size. "
            "Give `fit` a larger `batch_size` instead. "
            f"Received: gradient_accumulation_steps={optimizer.gradient_accumulation_steps}"
        )
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or getattr(
        optimizer, "loss_scale_factor", None
    )
    halves = sorted(
        {layer.path for layer in _layers(model) if layer.dtype_policy.compute_dtype == "float16"}
    )
    if scales or halves:
        received = f"{halves[0]} in float16" if halves else type(optimizer).__name__
        raise ValueError(
            "Private training needs unscaled gradients, and therefore neither loss scaling nor "
            f"float16: use float32 or mixed_bfloat16. Received: {received}"
        )
    if getattr(model, "steps_per_execution", 1) != 1:
        raise ValueError(
            "Private training needs `steps_per_execution=1`, because each step is written to the "
            f"ledger before it is done. Received: steps_per_execution={model.steps_per_execution}"
        )
    mixing = [
        layer.path for layer in _layers(model) if isinstance(layer, keras.layers.BatchNormalization)
    ]
    if mixing:
        raise ValueError(
            "Private training needs layers that compute each row independently of the others, but "
            "BatchNormalization mixes the rows of a batch and stores their mean. "
            f"Received: {mixing[0]}"
        )
    for metric in [metric for metric in keras.tree.flatten(metrics) if metric is not None]:
        name = getattr(metric, "name", None) or str(metric)
        if not name.startswith(UNPROTECTED):
            raise ValueError(
                "Metrics on private records are not covered by the guarantee, so their names must "
                f"begin with {UNPROTECTED!r}. To evaluate other metrics, compile without "
                f"`privacy`. Received: {name!r}"
            )


def check_fit(arguments, public_validation):
    """Raise ValueError if private training does not support the arguments of `fit`.

    Args:
        arguments: dict of arguments of `fit`.
        public_validation: bool. True if the user declares the validation data public.
    """
    reasons = {
        "shuffle": "each step draws its rows at random",
        "steps_per_epoch": "`epochs` and `batch_size` determine the steps that are accounted for",
        "class_weight": "the loss of a record must depend on this record only, and must not be "
        "weighted by more than 1",
        "validation_split": "metrics on private records would be reported as if they were public; "
        "give public `validation_data` or evaluate later",
    }
    for name, reason in reasons.items():
        value = arguments.get(name)
        if value is not None and not (name == "validation_split" and value == 0):
            raise ValueError(
                f"`{name}` must be None in private training: {reason}. Received: {name}={value!r}"
            )
    if arguments.get("validation_data") is not None and not public_validation:
        raise ValueError(
            "`validation_data` must be None in private training, because the guarantee does not "
            "cover metrics on it. If the data are public, set `DPSGD(public_validation=True)`. "
            "Received: validation_data"
        )
    for callback in _with_parts(all_callbacks(arguments)):
        if isinstance(
            callback, (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
        ):
            raise ValueError(
                "Weights saved during private training need their ledger: use "
                f"`TrainingCheckpoint`. Received: {type(callback).__name__}"
            )
        if str(getattr(callback, "monitor", "")).startswith(UNPROTECTED):
            raise ValueError(
                "Training must not depend on metrics that no noise protects: let callbacks monitor "
                "a metric on public validation data. "
                f"Received: {type(callback).__name__} of {callback.monitor!r}"
            )


def check_distribution(arguments, metrics):
    """Raise ValueError if the current distribution does not support private training.

    Args:
        arguments: dict of arguments of `fit`.
        metrics: nested structure of the arguments `metrics` and `weighted_metrics` of `compile`.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    backend.check_distribution_support()
    kinds = (keras.distribution.DataParallel, keras.distribution.ModelParallel)
    if not isinstance(distribution, kinds):
        raise ValueError(
            "Private training clips and counts each row once, and knows how `DataParallel` and "
            "`ModelParallel` of keras.distribution divide the rows. "
            f"Received: {type(distribution).__name__}"
        )
    own = [metric for metric in keras.tree.flatten(metrics) if metric is not None]
    if own and backend.data_devices() > 1:
        raise ValueError(
            "Metrics are updated row by row in private training, which several devices cannot do "
            f"together. Compile without them. Received: {len(own)} metrics and "
            f"{backend.data_devices()} devices that divide the rows"
        )
    if backend.process_count() > 1 and distribution.auto_shard_dataset:
        raise ValueError(
            "Private training shards its batches among the processes itself: set "
            "`auto_shard_dataset=False`. Received: auto_shard_dataset=True"
        )
    if backend.process_count() > 1 and checkpoint_of(arguments) is not None:
        raise ValueError(
            "A `TrainingCheckpoint` resumes private training in one process. "
            f"Received: {backend.process_count()} processes"
        )


def _with_parts(callbacks):
    """Return callbacks and those that they hold, in attributes of any name."""
    found = list(callbacks)
    for callback in found:  # which grows
        values = [value for name, value in vars(callback).items() if name != "_model"]
        for part in keras.tree.flatten(values):
            if isinstance(part, keras.callbacks.Callback) and not any(part is c for c in found):
                found.append(part)
    return found


def check_execution(model):
    """Raise ValueError if the backend would replicate or rewrite the steps of a compiled model."""
    executor = backend.unsupported_executor(model)
    if executor:
        raise ValueError(
            "Private training runs its steps as they are and on one device, so that each row is "
            "clipped and counted once and no noise is drawn twice. Build, compile and fit the "
            "model outside of a `tf.distribute` strategy, and on PyTorch without "
            f"`jit_compile=True`. Received: {executor}"
        )


def check_microbatch(size, takes_row_variables):
    """Raise ValueError for a microbatch of several rows if the model cannot clip each of them.

    Args:
        size: int or None. `microbatch_size` of `DPSGD`.
        takes_row_variables: bool. True if the model can compute each row with its own copy of the
            trainable variables.
    """
    if size not in (None, 1) and not takes_row_variables:
        raise ValueError(
            "`microbatch_size` must be 1 or None unless the model can compute the gradient of each "
            "of several rows, as `VaultGemmaCausalLM` can with the default loss and metrics unless "
            "the embedding has an adapter. "
            f"Received: microbatch_size={size}"
        )


def check_rows(rows, unit):
    """Raise ValueError if private training does not support the data.

    Args:
        rows: nested arrays, as `sampling.as_rows` returns them.
        unit: str. "row", "sequence" or "user", the unit of privacy.
    """
    mask = rows[0].get("padding_mask") if isinstance(rows[0], dict) else None
    if unit != "sequence" and mask is not None and mask.max(initial=0) > 1:
        raise ValueError(
            "A packed row has several documents, possibly of several people, but the guarantee "
            f"protects one {unit}. Train on one document per row, or set "
            '`DPSGD(unit="sequence")` if the packed sequence is what is to be protected. '
            f"Received: {int(mask.max())} documents in a row"
        )
    weights = rows[2] if len(rows) > 2 else np.ones(1)
    if not (weights.min(initial=0) >= 0 and weights.max(initial=0) <= 1):
        raise ValueError(
            "`sample_weight` must be from 0 to 1 in private training, so that no record counts "
            f"more than once. Received: {weights.min()} to {weights.max()}"
        )


def check_groups(groups, unit):
    """Raise ValueError if rows have labels of users without `unit="user"`, or the reverse.

    Args:
        groups: labels, or None.
        unit: str. "row", "sequence" or "user", the unit of privacy; None without privacy.
    """
    if groups is not None and unit != "user":
        received = "no `privacy`" if unit is None else f"unit={unit!r}"
        raise ValueError(
            '`groups` must be None unless `compile` got `DPSGD(unit="user")`, because nothing else '
            f"protects persons. Received: `groups` and {received}"
        )
    if groups is None and unit == "user":
        raise ValueError(
            '`DPSGD(unit="user")` needs `groups` in `fit`: for each row, the label of the person '
            "whose row it is. Received: groups=None"
        )


def check_users(count, batch_size):
    """Raise ValueError for too few users.

    Args:
        count: int. Number of users.
        batch_size: int. Expected number of users in a batch.
    """
    if count < 2:
        raise ValueError(
            "`groups` must name at least 2 users, because one user's data cannot hide among those "
            f"of others. Received: {count} user"
        )
    if batch_size > count:
        raise ValueError(
            f"`batch_size`, the expected number of users in a step, must be at most {count}, the "
            f"number of users. Received: batch_size={batch_size}"
        )


def warn_of_other_units(units, unit):
    """Warn if earlier runs on the same rows protected rows and this one users, or the reverse.

    Args:
        units: iterable of str. Descriptions of what the earlier runs protected.
        unit: str. Description of what this run protects.
    """
    others = [other for other in units if is_of_users(other) != is_of_users(unit)]
    if others:
        warnings.warn(
            f"An earlier run on these rows protected {others[0]}, this one protects {unit}. Their "
            "ε together holds for a person with a single row; for others it is larger",
            stacklevel=2,
        )


def check_losses(model, rows):
    """Raise ValueError if the loss is not a sum of one term per row.

    That is the case for losses that layers add, and for a compiled loss that mixes rows.

    Args:
        model: compiled `keras.Model`.
        rows: nested arrays, as `sampling.as_rows` returns them.
    """
    if model.losses:
        raise ValueError(
            "Private training needs a loss that is a sum over rows, without regularizers and "
            "`add_loss`: use the optimizer's `weight_decay`. "
            f"Received: {len(model.losses)} added losses"
        )
    for loss in [] if model.loss is None else keras.tree.flatten(model.loss):
        function = keras.losses.get(loss)
        # `call` of a `keras.losses.Loss` returns the values before they are averaged.
        function = getattr(function, "call", function)
        x, y = (keras.tree.map_structure(lambda array: array[[0, -1]], part) for part in rows[:2])
        predicted = keras.ops.convert_to_numpy(model(x))
        together, alone = (_values(function, y[:count], predicted[:count]) for count in (2, 1))
        if together.shape[:1] != (2,) or not np.allclose(together[:1], alone, rtol=1e-4, atol=1e-6):
            name = getattr(loss, "name", None) or getattr(loss, "__name__", loss)
            raise ValueError(
                "Private training needs a loss with one value per row, which depends on this row "
                f"only. Received: {name!r}, which mixes the rows of a batch"
            )


def _values(function, *arrays):
    return np.asarray(
        keras.ops.convert_to_numpy(function(*map(keras.ops.convert_to_tensor, arrays)))
    )


def _layers(layer):
    """Yield a layer and all of its sublayers that Keras lists."""
    yield layer
    for sublayer in getattr(layer, "layers", []):
        yield from _layers(sublayer)
