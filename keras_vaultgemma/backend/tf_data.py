"""TensorFlow's tensors and datasets, recognised without importing TensorFlow."""

import keras

from keras_vaultgemma.backend.selection import NAME


def is_tensorflow(x):
    """True if `x` is a TensorFlow tensor, ragged tensor or dataset."""
    return any(base.__module__.partition(".")[0] == "tensorflow" for base in type(x).__mro__)


def is_symbolic_tensorflow(x):
    """True if `x` is a tensor inside a `tf.function` or `tf.data` map, which has no value yet."""
    return is_tensorflow(x) and hasattr(x, "graph") and not hasattr(x, "numpy")


def tensorflow_dataset(make_batches, structure):
    """Return a `tf.data.Dataset` of generated batches.

    Args:
        make_batches: function without arguments that returns an iterator of nested NumPy arrays. It
            is called once an epoch.
        structure: nested `keras.KerasTensor`s, the shapes and dtypes of a batch.

    Raises:
        ValueError: On another backend than TensorFlow.
    """
    if NAME != "tensorflow":
        raise ValueError(
            f"A `tf.data.Dataset` needs the TensorFlow backend. Received: the backend {NAME!r}"
        )
    import tensorflow as tf

    signature = keras.tree.map_structure(
        lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), structure
    )
    return tf.data.Dataset.from_generator(make_batches, output_signature=signature)
