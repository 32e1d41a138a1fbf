"""Variables and batches that are divided among devices or processes (JAX)."""

import contextlib

import keras

from keras_vaultgemma.backend.selection import NAME


def check_distribution_support():
    """Raise ValueError on backends where Keras does not divide variables."""
    if NAME != "jax":
        raise ValueError(
            "Models are distributed on the JAX backend only, because Keras ignores layouts on "
            f"others. Received: KERAS_BACKEND={NAME!r}"
        )


def unsupported_executor(model):
    """Return the name of an unsupported executor that `fit` would run the steps of a model with.

    Args:
        model: compiled `keras.Model`.

    Returns:
        Class name of a `tf.distribute.Strategy` (TensorFlow), `"torch.compile"` (PyTorch), or None.
    """
    if NAME == "torch" and model.jit_compile:
        return "torch.compile"
    if NAME == "tensorflow":
        import tensorflow as tf

        strategy = model.distribute_strategy
        with strategy.scope():
            return type(strategy).__name__ if tf.distribute.has_strategy() else None
    return None


def per_device(function, divided, whole):
    """Call a function per device, for the rows of a batch on it (JAX with a distribution).

    XLA's partitioner divides neither a sort nor a loop over rows, so each device would compute all
    of them.

    Args:
        function: function of `(divided, whole)` that returns a tuple of nested tensors: results of
            the rows, [n, ...], and sums over the rows.
        divided: nested tensors [N, ...], divided by rows.
        whole: nested tensors, which every device is given.

    Returns:
        `function(divided, whole)`, also where N is not a multiple of the number of devices.
    """
    distribution = keras.distribution.distribution() if NAME == "jax" else None
    if distribution is None:
        return function(divided, whole)
    import jax

    devices, axis = distribution.num_model_replicas, distribution.batch_dim_name
    if devices == 1 or jax.tree.leaves(divided)[0].shape[0] % devices:
        return function(divided, whole)

    def part(divided, whole):
        results, sums = function(divided, whole)
        return results, jax.lax.psum(sums, axis)

    specs = (jax.sharding.PartitionSpec(axis), jax.sharding.PartitionSpec())
    mesh = distribution.device_mesh.backend_mesh
    # The compiler partitions along the other axes of the mesh.
    sharded = jax.shard_map(
        part, mesh=mesh, in_specs=specs, out_specs=specs, axis_names={axis}, check_vma=False
    )
    return sharded(divided, whole)


@contextlib.contextmanager
def all_gathered(variables):
    """All-gather variables that are divided among processes (JAX), to save them.

    Inside the `with` block these variables have their whole values. Every process must enter it,
    and all leave it together.

    Yields:
        bool. True if this process should write: the first one, or any if no variable is divided.
    """
    divided = [v for v in variables if not v.value.is_fully_addressable] if NAME == "jax" else []
    if not divided:
        yield True
        return
    import jax
    from jax.experimental import multihost_utils

    is_first = jax.process_index() == 0
    whole = []
    for variable in divided:
        value = multihost_utils.process_allgather(variable.value, tiled=True)
        whole += [(variable, value)] if is_first else []
    try:
        with keras.StatelessScope(state_mapping=whole):
            yield is_first
    finally:
        multihost_utils.sync_global_devices("saved")
