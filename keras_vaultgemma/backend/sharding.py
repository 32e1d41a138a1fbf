"""Variables and batches that are divided among devices or processes (JAX)."""

import contextlib

import keras
import numpy as np

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


def data_devices():
    """Return D, how many devices, or groups of them, the rows of a batch are divided among."""
    return _data_axis()[1]


def own_parts():
    """Return the indices of the D parts of a batch whose devices belong to this process."""
    distribution, devices = _data_axis()
    if distribution is None or devices == 1:
        return [0]
    import jax

    mesh = distribution.device_mesh.backend_mesh
    axis = mesh.axis_names.index(distribution.batch_dim_name)
    is_own = np.vectorize(lambda d: d.process_index == jax.process_index())(mesh.devices)
    return [int(i) for i in np.unique(np.nonzero(is_own)[axis])]


def per_device(function, divided, whole, add=None):
    """Call a function per device, for the rows of a batch on it (JAX with a distribution).

    XLA's partitioner divides neither a sort nor a loop over rows, so each device would compute all
    of them. Within `function`, which has the rows of one device, this calls its own function as it
    is.

    Args:
        function: function of `(divided, whole)` that returns a tuple of nested tensors: results of
            the rows, [n, ...], and sums over the rows.
        divided: nested tensors [N, ...], divided by rows.
        whole: nested tensors, which every device is given.
        add: function of the sums on a device that returns those of all devices, the same on each,
            by `sum_over_devices` and `fold_over_devices`. Defaults to `sum_over_devices`.

    Returns:
        `function(divided, whole)`, also where N is not a multiple of the number of devices.
    """
    distribution, devices = _data_axis()
    if devices == 1:
        return function(divided, whole)
    import jax

    axis = distribution.batch_dim_name
    is_inside = axis in jax.sharding.get_abstract_mesh().manual_axes
    if is_inside or jax.tree.leaves(divided)[0].shape[0] % devices:
        return function(divided, whole)

    def part(divided, whole):
        results, sums = function(divided, whole)
        return results, (add or sum_over_devices)(sums)

    specs = (jax.sharding.PartitionSpec(axis), jax.sharding.PartitionSpec())
    mesh = distribution.device_mesh.backend_mesh
    # The compiler partitions along the other axes of the mesh.
    sharded = jax.shard_map(
        part, mesh=mesh, in_specs=specs, out_specs=specs, axis_names={axis}, check_vma=False
    )
    return sharded(divided, whole)


def one_of_equal(tensors):
    """Return row 0 of nested tensors [D, ...] whose rows, one for each device, are all equal.

    Each device takes its own row, without communication. XLA's CPU devices run collectives that do
    not depend on one another in any order, and might wait for each other in a circle.
    """
    distribution, devices = _data_axis()
    if devices == 1:
        return keras.tree.map_structure(lambda x: x[0], tensors)
    import jax

    axis = distribution.batch_dim_name
    return jax.shard_map(
        lambda own: jax.tree.map(lambda x: x[0], own),
        mesh=distribution.device_mesh.backend_mesh,
        in_specs=jax.sharding.PartitionSpec(axis),
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )(tensors)


def sum_over_devices(tensors):
    """Return the sums of nested tensors over the devices, added in any order, in `per_device`."""
    import jax

    return jax.lax.psum(tensors, _data_axis()[0].batch_dim_name)


def fold_over_devices(add, tensors):
    """Combine the tensors of all devices, one device after the other, in `per_device`.

    Every device computes the same, in the same order, and so has the same bits. It takes D
    broadcasts, and the memory of two more tuples of tensors.

    Args:
        add: function of two tuples of tensors that returns another one.
        tensors: tuple of tensors, those of the device.
    """
    import jax

    distribution, devices = _data_axis()
    axis = distribution.batch_dim_name
    index = jax.lax.axis_index(axis)

    def of_device(i):  # exact, because all other terms are 0
        return jax.lax.psum(tuple(jax.numpy.where(index == i, x, 0) for x in tensors), axis)

    return jax.lax.fori_loop(1, devices, lambda i, sums: add(sums, of_device(i)), of_device(0))


def _data_axis():
    """Return the current distribution, or None, and the size D of its mesh's axis for rows."""
    distribution = keras.distribution.distribution() if NAME == "jax" else None
    if distribution is None:
        return None, 1
    mesh = distribution.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    return distribution, sizes.get(distribution.batch_dim_name, 1)


def process_count():
    """Return the number of processes that train together (JAX with a distribution)."""
    distribution = keras.distribution.distribution() if NAME == "jax" else None
    return 1 if distribution is None else distribution.num_processes


def is_first_process():
    """Return True in the first of the processes that train together, and in one alone."""
    if process_count() == 1:
        return True
    import jax

    return jax.process_index() == 0


def from_processes(content):
    """Return the bytes that each of the processes that train together calls this with, in order.

    Args:
        content: bytes.
    """
    if process_count() == 1:
        return [content]
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.array([len(content)], "int32")).reshape(-1)
    padded = np.zeros(max(1, sizes.max()), "uint8")
    padded[: len(content)] = np.frombuffer(content, "uint8")
    found = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(found, sizes, strict=True)]


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
