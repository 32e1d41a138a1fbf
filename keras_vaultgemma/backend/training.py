"""One way to write a train step for the three of Keras."""

import keras
import numpy as np

from keras_vaultgemma.backend.autodiff import without_gradients
from keras_vaultgemma.backend.selection import NAME


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
    return logs, tuple(
        [scope.get_current_value(variable) for variable in variables] for variables in groups
    )


# MERGED: """Normal deviates from a seed of 128 bits."""
def normal(seed, shape):
    """Independent standard normal deviates, float32; the same for the same seed on the same backend.

    The generator takes all bits of the seed: Philox (Salmon et al., 2011, doi:10.1145/2063384.2063405) on TensorFlow
    and PyTorch, XLA's default of the device on JAX. PyTorch's deviates are NumPy's, for `torch.Generator` on a CPU
    reads 32 bits of a seed.

    Args:
        seed: int32 [4], a tensor.
        shape: tuple.
    """
    if NAME == "jax":
        import jax

        # JAX's other generators have keys of 64 bits.
        key = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, "uint32"), impl="rbg")
        return jax.random.normal(key, shape, "float32")
    if NAME == "tensorflow":
        import tensorflow as tf

        pairs = tf.bitcast(tf.reshape(seed, (2, 2)), "int64")
        return tf.random.stateless_normal(shape, pairs, dtype="float32", alg="philox")
    import torch

    key = np.ascontiguousarray(seed.cpu().numpy()).view("<u8")
    deviates = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, "float32")
    return torch.from_numpy(np.asarray(deviates)).to(seed.device)
