"""Loops whose iterations do not overlap."""

import keras

from keras_vaultgemma.backend.choice import NAME


def while_loop(condition, body, state):
    """As `keras.ops.while_loop`, one iteration after the other.

    TensorFlow would begin as many as ten at once, each as far as it waits for nothing from the one before, and keep
    what they have computed: of a loop that saves memory nothing would be left.
    """
    if NAME != "tensorflow":
        return keras.ops.while_loop(condition, body, state)
    import tensorflow as tf

    return tf.while_loop(condition, body, state, parallel_iterations=1)
