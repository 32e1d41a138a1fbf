"""What training has to know about a Keras optimizer."""

import json


def inner_optimizer(optimizer):
    """Return the optimizer that a `LossScaleOptimizer` wraps, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def accumulates(optimizer):
    """Return True if an optimizer updates the weights only after several batches."""
    return bool(getattr(inner_optimizer(optimizer), "gradient_accumulation_steps", None))


def accumulators(optimizer):
    """Return the variables in which an optimizer accumulates gradients, found by Keras's name."""
    return [v for v in optimizer.variables if v.name.endswith("gradient_accumulator")]


def check_variables(optimizer, trained):
    """Raise ValueError if an optimizer was built for other variables than those to train.

    Keras's own errors name a variable or, on JAX, a number. Keras has no public attribute for it.

    Args:
        optimizer: built `keras.optimizers.Optimizer`.
        trained: list of the model's trainable variables.
    """
    known = getattr(optimizer, "_trainable_variables", trained)
    if list(map(id, known)) != list(map(id, trained)):
        common = len({*map(id, known)} & {*map(id, trained)})
        raise ValueError(
            f"The optimizer must have been built for the {len(trained)} variables that are "
            "trainable. Adapters or `trainable` changed since: call `compile` again, with a new "
            f"optimizer. Received: an optimizer of {len(known)} variables, {common} of them among "
            "those"
        )


def constants(optimizer):
    """Return the hyperparameters of an optimizer as a dict for JSON."""
    try:
        config = optimizer.get_config()
    except NotImplementedError:  # of a schedule of the user's own
        return {}
    config |= (config.pop("inner_optimizer", None) or {}).get("config", {})
    rate = config.get("learning_rate")
    if isinstance(rate, dict) and rate.get("class_name") == "__lambda__":
        config["learning_rate"] = "a function"  # whose serialized form has its line in the script
    del config["name"]
    return json.loads(json.dumps(config, default=lambda value: type(value).__name__))
