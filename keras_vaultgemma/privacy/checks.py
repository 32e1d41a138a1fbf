"""What private training does not do, and one sentence for each: refused before a step is done."""

import keras
import numpy as np

from keras_vaultgemma import backend

UNPROTECTED = "unprotected_"
"""What names of metrics on private rows begin with: the mark that no noise protects them."""


def check_model(model, metrics):
    """Raise ValueError for a compiled model that cannot be trained privately.

    Args:
        model: compiled `keras.Model`.
        metrics: what the user gave as `metrics` and `weighted_metrics`, a nest.
    """
    optimizer = model.optimizer
    if getattr(optimizer, "gradient_accumulation_steps", None):
        raise ValueError(
            "Private training needs an optimizer without `gradient_accumulation_steps`: batches that are drawn one by "
            "one and added up have a larger ε than one batch of their size; give `fit` a larger `batch_size`. "
            f"Received: gradient_accumulation_steps={optimizer.gradient_accumulation_steps}"
        )
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or getattr(
        optimizer, "loss_scale_factor", None
    )
    halves = sorted(
        {layer.path for layer in _layers(model) if layer.dtype_policy.compute_dtype == "float16"}
    )
    if scales or halves:
        raise ValueError(
            "Private training needs gradients at their own scale, which loss scaling and float16 do not give: use "
            f"float32 or mixed_bfloat16. Received: {halves[0] + ' in float16' if halves else type(optimizer).__name__}"
        )
    if getattr(model, "steps_per_execution", 1) != 1:
        raise ValueError(
            "Private training needs `steps_per_execution=1`: each step is written down before it is done. "
            f"Received: steps_per_execution={model.steps_per_execution}"
        )
    mixing = [
        layer.path for layer in _layers(model) if isinstance(layer, keras.layers.BatchNormalization)
    ]
    if mixing:
        raise ValueError(
            "Private training needs layers that compute each row by itself; BatchNormalization mixes the rows of a "
            f"batch and keeps their mean. Received: {mixing[0]}"
        )
    for metric in [metric for metric in keras.tree.flatten(metrics) if metric is not None]:
        name = getattr(metric, "name", None) or str(metric)
        if not name.startswith(UNPROTECTED):
            raise ValueError(
                f"Metrics on private rows are not covered by the guarantee, and their names must begin with "
                f"{UNPROTECTED!r} to say so; or compile them without `privacy` for evaluation. Received: {name!r}"
            )


def check_fit(arguments, public_validation):
    """Raise ValueError for arguments of `fit` that private training refuses.

    Args:
        arguments: dict.
        public_validation: whether the user says that validation data is public.
    """
    reasons = {
        "shuffle": "each step draws its rows by itself",
        "steps_per_epoch": "the steps follow from `epochs` and `batch_size`, and the accounting is theirs",
        "class_weight": "a row's loss must depend on the row alone, and weights above 1 count it more than once",
        "validation_split": "metrics on private rows would be told as if they were public; give public "
        "`validation_data` or evaluate later",
    }
    for name, reason in reasons.items():
        value = arguments.get(name)
        if value is not None and not (name == "validation_split" and value == 0):
            raise ValueError(
                f"Private training takes no `{name}`: {reason}. Received: {name}={value!r}"
            )
    if arguments.get("validation_data") is not None and not public_validation:
        raise ValueError(
            "Metrics on `validation_data` are not covered by the guarantee: say `DPSGD(public_validation=True)` where "
            "the rows are public, or leave them out. Received: validation_data"
        )
    for callback in keras.tree.flatten(arguments.get("callbacks") or []):
        if isinstance(
            callback, (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
        ):
            raise ValueError(
                "Weights that are saved in the middle of private training must come with their ledger: use "
                f"`TrainingCheckpoint`. Received: {type(callback).__name__}"
            )
        if str(getattr(callback, "monitor", "")).startswith(UNPROTECTED):
            raise ValueError(
                "What training does next must not depend on metrics that no noise protects: let callbacks monitor a "
                f"metric on public validation data. Received: {type(callback).__name__} of {callback.monitor!r}"
            )
    if keras.distribution.distribution() is not None:
        raise ValueError(
            "Private training runs on one device, where each row is clipped and counted once. "
            f"Received: {type(keras.distribution.distribution()).__name__}"
        )


def check_execution(model):
    """Raise ValueError for a compiled `keras.Model` whose steps would not be done as they are written."""
    executor = backend.unsupported_executor(model)
    if executor:
        raise ValueError(
            "Private training does its steps as they are and on one device, where each row is clipped and counted once "
            "and no noise is drawn twice: build, compile and fit the model outside of a `tf.distribute` strategy, and "
            f"on PyTorch without `jit_compile=True`. Received: {executor}"
        )


def check_microbatch(size, takes_row_variables):
    """Raise ValueError for several rows at a time with a model whose rows would then not be clipped one by one.

    Args:
        size: what the user gave as `microbatch_size`.
        takes_row_variables: that of the model's `RowLosses`.
    """
    if size not in (None, 1) and not takes_row_variables:
        raise ValueError(
            "`microbatch_size` must be 1 or None unless the model can compute several rows each by itself, as "
            "`VaultGemmaCausalLM` does with the default loss and metrics where LoRA on projections is all that is "
            f"trained. Received: microbatch_size={size}"
        )


def check_rows(rows, unit):
    """Raise ValueError for rows that private training refuses.

    Args:
        rows: `private_batches.as_rows`.
        unit: "row" or "sequence".
    """
    mask = rows[0].get("padding_mask") if isinstance(rows[0], dict) else None
    if unit == "row" and mask is not None and mask.max(initial=0) > 1:
        raise ValueError(
            "Rows that several documents are packed into may be several people's, whom one row's guarantee does not "
            'protect: train on one document a row, or say `DPSGD(unit="sequence")` where the packed sequence is what '
            f"shall be protected. Received: {int(mask.max())} documents in a row"
        )
    weights = rows[2] if len(rows) > 2 else np.ones(1)
    if not (weights.min(initial=0) >= 0 and weights.max(initial=0) <= 1):
        raise ValueError(
            "`sample_weight` must be from 0 to 1 in private training, for a row must not count more than once. "
            f"Received: {weights.min()} to {weights.max()}"
        )


def check_losses(model, rows):
    """Raise ValueError for losses that layers add, and for a loss of the user's that mixes rows.

    Args:
        model: compiled `keras.Model`.
        rows: `private_batches.as_rows`.
    """
    if model.losses:
        raise ValueError(
            "Private training needs a loss that is a sum over rows; regularizers and `add_loss` are none: use the "
            f"optimizer's `weight_decay`. Received: {len(model.losses)} added losses"
        )
    for loss in [] if model.loss is None else keras.tree.flatten(model.loss):
        function = keras.losses.get(loss)
        function = getattr(
            function, "call", function
        )  # of a `keras.losses.Loss`, that before it averages
        x, y = (keras.tree.map_structure(lambda array: array[[0, -1]], part) for part in rows[:2])
        predicted = keras.ops.convert_to_numpy(model(x))
        together, alone = (_values(function, y[:count], predicted[:count]) for count in (2, 1))
        if together.shape[:1] != (2,) or not np.allclose(together[:1], alone, rtol=1e-4, atol=1e-6):
            name = getattr(loss, "name", None) or getattr(loss, "__name__", loss)
            raise ValueError(
                "Private training needs a loss of which each row has its own, before they are averaged. "
                f"Received: {name!r}, which mixes the rows of a batch"
            )


def _values(function, *arrays):
    return np.asarray(
        keras.ops.convert_to_numpy(function(*map(keras.ops.convert_to_tensor, arrays)))
    )


def _layers(layer):
    """A layer and all below it that Keras tells of."""
    yield layer
    for below in getattr(layer, "layers", []):
        yield from _layers(below)
