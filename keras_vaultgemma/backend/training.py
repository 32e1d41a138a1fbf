"""Training and test steps written once for all backends."""

import keras

from keras_vaultgemma.backend.autodiff import without_gradients
from keras_vaultgemma.backend.selection import NAME
from keras_vaultgemma.backend.tensors import value_of


def train_step(model, step, *args):
    """Run a training step that reads and assigns the model's variables, on any backend.

    Args:
        model: `keras.Model` whose optimizer is built.
        step: function of a batch. It updates variables (also the optimizer's and the metrics') and
            returns logs. It takes gradients by `loss_gradients` or `gradients`.
        *args: arguments of `keras.Model.train_step`: the batch; on JAX the variables' values and
            the batch.

    Returns:
        What `keras.Model.train_step` returns on this backend.
    """
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        [] if model.optimizer is None else model.optimizer.variables,
        model.metrics_variables,
    )
    return _run_step(variables, step, args)


def test_step(model, step, *args):
    """Run a test step, like `train_step`. The optimizer's variables have no part in it."""
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.metrics_variables,
    )
    return _run_step(variables, step, args)


def _uncompiled(function):
    """Return `function` such that `torch.compile` leaves it alone on PyTorch; else unchanged.

    Keras compiles steps so with `jit_compile=True`. PyTorch 2.13 raises in steps that take their
    gradients themselves, or compiles one layer for minutes, in dozens of parts.
    """
    if NAME != "torch":
        return function
    import torch

    return torch.compiler.disable(function)


@_uncompiled
def _run_step(groups, step, args):
    if NAME != "jax":
        return without_gradients(step)(*args)
    state, data = args
    mapping = [
        pair
        for variables, values in zip(groups, state, strict=True)
        for pair in zip(variables, values, strict=True)
    ]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        logs = step(data)
    return logs, tuple([scope.get_current_value(v) for v in variables] for variables in groups)


def apply_gradients(optimizer, gradients, variables):
    """Update variables, like `optimizer.apply`.

    On JAX, `LossScaleOptimizer.apply` of Keras 3.15 assigns variables inside `jax.lax.cond`, whose
    values leak; its `stateless_apply` returns them.

    Args:
        optimizer: built `keras.optimizers.Optimizer`.
        gradients: list of tensors or None, one for each of the variables.
        variables: list of all variables that the optimizer was built for.
    """
    if NAME != "jax" or not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer.apply(gradients, variables)
        return
    known = optimizer.variables
    results = optimizer.stateless_apply(
        [value_of(v) for v in known], gradients, [value_of(v) for v in variables]
    )
    for variable, value in zip([*variables, *known], keras.tree.flatten(results), strict=True):
        variable.assign(value)


def loss_gradients(model, loss):
    """Compute the gradients of a loss with respect to a model's trainable variables.

    Args:
        model: `keras.Model`. Changes that `loss` makes to its other variables, such as the seeds of
            dropout, are kept.
        loss: function without arguments that returns a scalar and nested tensors.

    Returns:
        Tuple `(gradients, tensors)`: a list with one gradient for each of the model's trainable
        variables (None where the loss does not depend on one) and the nested tensors.
    """
    trained = model.trainable_variables
    if NAME == "jax":
        return _jax_loss_gradients(model, trained, loss)
    if NAME == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            scalar, tensors = loss()
        return tape.gradient(scalar, [v.value for v in trained]), tensors

    import torch

    with torch.enable_grad():
        scalar, tensors = loss()
        found = torch.autograd.grad(scalar, [v.value for v in trained], allow_unused=True)
    return list(found), keras.tree.map_structure(lambda x: x.detach(), tensors)


def _jax_loss_gradients(model, trained, loss):
    import jax

    is_trained = {id(v) for v in trained}
    others = [v for v in model.variables if id(v) not in is_trained]
    others += [] if model.optimizer is None else model.optimizer.variables
    before = [value_of(v) for v in others]

    def stateless(values):
        # All variables, because a scope hides the one around it.
        mapping = zip([*trained, *others], [*values, *before], strict=True)
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            scalar, tensors = loss()
            after = [scope.get_current_value(v) for v in others]
        changed.extend(i for i, value in enumerate(after) if value is not before[i])
        return scalar, (tensors, [after[i] for i in changed])

    changed = []
    values = [value_of(v) for v in trained]
    found, (tensors, after) = jax.grad(stateless, has_aux=True)(values)
    for i, value in zip(changed, after, strict=True):
        others[i].assign(value)
    return found, tensors
