"""TensorFlow's tensors and data sets, recognised without importing TensorFlow."""

import keras

from keras_vaultgemma.backend.selection import NAME


def is_tensorflow(x):
    """Whether `x` is a TensorFlow tensor, ragged tensor or dataset; asks without importing TensorFlow."""
    return any(base.__module__.partition(".")[0] == "tensorflow" for base in type(x).__mro__)


def is_symbolic_tensorflow(x):
    """Whether `x` is a tensor inside a `tf.function` or a `tf.data` map, which has no value yet."""
    return is_tensorflow(x) and hasattr(x, "graph") and not hasattr(x, "numpy")


def tensorflow_dataset(make_batches, structure):
    """A `tf.data.Dataset` of what `make_batches()` yields, called anew for each epoch; on TensorFlow only.

    Args:
        make_batches: returns an iterator of nested NumPy arrays.
        structure: a batch's nest with a `keras.KerasTensor` for each array.
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


def in_tensorflow_graph(function, inputs, shapes, dtypes):
    """Call `function` on the NumPy values of `inputs` from inside a TensorFlow graph (a `tf.data` map).

    Args:
        function: takes as many NumPy arrays as `inputs` has tensors, returns a list of NumPy arrays.
        inputs: list of symbolic TensorFlow tensors.
        shapes, dtypes: of the outputs, one entry each.

    Returns:
        List of TensorFlow tensors.
    """
    import tensorflow as tf

    outputs = tf.numpy_function(
        lambda *args: function(*args), inputs, [tf.as_dtype(d) for d in dtypes]
    )
    return [tf.ensure_shape(output, shape) for output, shape in zip(outputs, shapes, strict=True)]
