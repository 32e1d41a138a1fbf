"""Small models that several tests build."""

import keras
import numpy as np

from keras_vaultgemma import VaultGemmaBackbone

RELEASE_LIKE = dict(
    vocabulary_size=128,
    num_layers=3,
    num_query_heads=4,
    num_key_value_heads=4,
    hidden_dim=48,
    intermediate_dim=96,
    head_dim=16,
    max_sequence_length=64,
    initializer_range=0.15,
)


def random_backbone(**changes):
    """A small backbone with weights large enough to make every part of it matter."""
    return VaultGemmaBackbone(**{**RELEASE_LIKE, **changes})


def to_numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(x))


def gradients(loss, variables):
    """NumPy gradients of the scalar `loss()` with respect to trainable Keras variables."""
    if keras.config.backend() == "jax":
        import jax

        def stateless(values):
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return loss()

        found = jax.grad(stateless)([variable.value for variable in variables])
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        found = map(tf.convert_to_tensor, tape.gradient(value, [variable.value for variable in variables]))
    else:
        import torch

        found = torch.autograd.grad(loss(), [variable.value for variable in variables])
    return [to_numpy(gradient) for gradient in found]


class count_compilations:
    """A context that counts the programs XLA compiles on JAX; `count` stays None on other backends."""

    count = None

    def __enter__(self):
        self.is_open = True
        if keras.config.backend() == "jax":
            import jax

            self.count = 0
            jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error):
        self.is_open = False

    def _listen(self, event, duration, **kwargs):
        if self.is_open and event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
