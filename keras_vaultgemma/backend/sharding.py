"""Variables and rows that several devices or processes share (JAX)."""

import contextlib

import keras

from keras_vaultgemma.backend.selection import NAME


def check_distribution_support():
    """Raise ValueError where Keras does not divide variables among devices: everywhere but on JAX."""
    if NAME != "jax":
        raise ValueError(
            "Models are distributed on the JAX backend only: Keras would ignore the layout on another one. "
            f"Received: KERAS_BACKEND={NAME!r}"
        )


def unsupported_executor(model):
    """What `fit` would run a model's steps with, other than as they are and on one device; None for nothing.

    Args:
        model: compiled `keras.Model`.

    Returns:
        A name: of a `tf.distribute.Strategy` (TensorFlow), or `torch.compile` (PyTorch).
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
    """`function(divided, whole)`, on JAX with a distribution set by every device for the rows of a batch that it has.

    Left to itself, the compiler divides neither a sort nor a loop over rows: each device would do the work of all.

    Args:
        function: returns (what belongs to the rows it was given, what is to be summed over all of them).
        divided: nested tensors [N, ...]; rows of them stand on their own.
        whole: nested tensors that all rows need.

    Returns:
        As `function` of all rows. It is given all where N is no multiple of the devices.
    """
    distribution = keras.distribution.distribution() if NAME == "jax" else None
    if distribution is None:
        return function(divided, whole)
    import jax

    shares, axis = distribution.num_model_replicas, distribution.batch_dim_name
    if shares == 1 or jax.tree.leaves(divided)[0].shape[0] % shares:
        return function(divided, whole)

    def share(divided, whole):
        of_rows, sums = function(divided, whole)
        return of_rows, jax.lax.psum(sums, axis)

    specs = (jax.sharding.PartitionSpec(axis), jax.sharding.PartitionSpec())
    mesh = distribution.device_mesh.backend_mesh
    # Other axes of the mesh stay the compiler's.
    program = jax.shard_map(
        share, mesh=mesh, in_specs=specs, out_specs=specs, axis_names={axis}, check_vma=False
    )
    return program(divided, whole)


@contextlib.contextmanager
def all_gathered(variables):
    """Inside, variables that are divided among processes (JAX) have their whole values, for the first process to save.

    Every process has to enter, and none goes on before the first one is done.

    Yields:
        Whether this process is to write: the first one, or any whose variables are all its own.
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
