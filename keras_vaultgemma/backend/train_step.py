"""One way to write a train step for the three of Keras."""

import keras

from keras_vaultgemma.backend.choice import NAME
from keras_vaultgemma.backend.gradients import without_gradients


def train_step(model, step, *args):
    """What `Model.train_step` returns on this backend, for a step that reads and assigns the model's variables.

    Args:
        model: `keras.Model`, its optimizer built.
        step: takes a batch, updates variables, the optimizer's and the metrics' too, and returns logs. It takes the
            gradients that it needs by `backend.gradients`.
        *args: of `train_step`: the batch, on JAX the variables' values and the batch.
    """
    if NAME != "jax":
        return without_gradients(step)(*args)
    state, data = args
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    values = [
        (variable, value)
        for variables, values in zip(groups, state, strict=True)
        for variable, value in zip(variables, values, strict=True)
    ]
    with keras.StatelessScope(state_mapping=values) as scope:
        logs = step(data)
    return logs, tuple([scope.get_current_value(variable) for variable in variables] for variables in groups)
