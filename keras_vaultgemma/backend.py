"""The one file that asks which Keras backend runs.

Importing it also imports keras-hub for the rest of the package, without letting it pull in TensorFlow on JAX and
PyTorch: keras-hub imports TensorFlow wherever that is installed, which costs seconds and a gigabyte, and needs it for
nothing that this package uses.
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

BACKENDS = ("jax", "torch", "tensorflow")


def _choose_backend():
    """Settle Keras's backend before Keras is imported, or say why it cannot be.

    Keras's own choice stands (`KERAS_BACKEND`, then its `keras.json`, then TensorFlow); only where that would be
    TensorFlow by default and TensorFlow is not installed, the first backend that is installed is taken instead.
    """
    if "keras" in sys.modules:
        return
    named = os.environ.get("KERAS_BACKEND")
    if named and named not in BACKENDS:
        raise ValueError(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}. Received: KERAS_BACKEND={named!r}")
    home = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    if named or (home / "keras.json").exists() or importlib.util.find_spec("tensorflow"):
        return
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    if not installed:
        raise ImportError(
            "Keras needs a backend and none is installed. Install one with `pip install keras-vaultgemma[jax]`, "
            "`[torch]` or `[tensorflow]`."
        )
    os.environ["KERAS_BACKEND"] = installed[0]


@contextlib.contextmanager
def without_tensorflow():
    """Inside, on JAX and PyTorch, TensorFlow looks as if it were not installed; keras-hub copes with that.

    A TensorFlow that somebody has imported already stays visible: it costs nothing any more.
    """
    import keras

    hide = keras.config.backend() != "tensorflow" and "tensorflow" not in sys.modules
    names = ("tensorflow", "tensorflow_text") if hide else ()
    sys.modules.update(dict.fromkeys(names))  # None stands for a module that cannot be imported
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


_choose_backend()

import keras  # noqa: E402

if keras.config.backend() not in BACKENDS:
    raise ValueError(
        f"keras_vaultgemma runs on the Keras backends {', '.join(BACKENDS)}. Received: {keras.config.backend()!r}"
    )
with without_tensorflow():
    import keras_hub  # noqa: F401

NAME = keras.config.backend()


def check_that_it_distributes():
    """Raise ValueError where Keras does not divide variables among devices: everywhere but on JAX."""
    if NAME != "jax":
        raise ValueError(
            "Models are distributed on the JAX backend only: Keras would ignore the layout on another one. "
            f"Received: KERAS_BACKEND={NAME!r}"
        )


def in_shares(function, divided, whole):
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
    program = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=specs, axis_names={axis}, check_vma=False)
    return program(divided, whole)


@contextlib.contextmanager
def gathered(variables):
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


def from_numpy(array, layout=None):
    """A contiguous array in memory of its own as what a Keras variable starts from, without a detour.

    Keras brings bfloat16 to PyTorch by way of float32, in three copies; the bits are the same.

    Args:
        layout: the variable's `jax.sharding.NamedSharding`, which Keras hands to an initializer while a distribution is
            set. Each device then gets its own part alone. (Keras itself would put the whole array on one device first,
            or make it a constant of a compiled program.)
    """
    if layout is not None:
        import jax

        mesh = jax.sharding.get_mesh()
        # Keras asks from inside `explicit_axes`, which knows layouts of such a mesh only.
        axis_types = (jax.sharding.AxisType.Explicit,) * len(mesh.axis_names)
        mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)
        sharding = jax.sharding.NamedSharding(mesh, layout.spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    if NAME == "torch" and array.dtype.name == "bfloat16":
        import torch

        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return array


def matmul(x, kernel, transposed=False):
    """`x` [..., in] times `kernel` [in, out], in their dtype, by the fastest routine of this backend for few rows.

    On PyTorch's CPU this is oneDNN where no gradient is asked for: it reads 35 to 45 GB/s of float32 weights where MKL,
    which `torch.matmul` calls, reads 18 to 27 (2 AMD cores), in either layout. On JAX's CPU, 16-bit products are asked
    for in float32 and for two rows or more: only so does XLA multiply 16-bit weights without a float32 copy of them.

    Args:
        transposed: whether `kernel` is [out, in] instead.
    """
    if NAME == "torch" and _has_onednn(x, kernel):
        import torch

        rows, weight = x.reshape(-1, x.shape[-1]), kernel if transposed else kernel.t()
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
        return product.reshape(*x.shape[:-1], weight.shape[0])
    if NAME == "jax" and x.dtype.itemsize == 2 and _is_jax_cpu():
        return _jax_product(x, kernel, transposed, "float32", least_rows=2).astype(x.dtype)
    if NAME == "jax" and transposed:
        # XLA would copy a transposed operand.
        return _jax_product(x, kernel, transposed, x.dtype)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def int8_matmul(x, kernel, transposed=False):
    """`matmul` of int8 and int8 to int32; has no gradient."""
    if NAME == "torch" and kernel.device.type == "cpu":
        import torch

        kernel = kernel.t() if transposed else kernel
        return torch._int_mm(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])
    if NAME == "jax" and _is_jax_cpu():
        return _jax_product(x, kernel, transposed, "int32", least_rows=2)
    return keras.ops.matmul(x, keras.ops.transpose(kernel) if transposed else kernel)


def _has_onednn(*tensors):
    import torch

    return (
        not torch.is_grad_enabled()
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_jax_cpu():
    import jax

    return jax.default_backend() == "cpu"


def _jax_product(x, kernel, transposed, dtype, least_rows=1):
    import jax

    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count < least_rows:
        # The barrier keeps XLA from seeing that the two rows are one.
        rows = jax.lax.optimization_barrier(jax.numpy.concatenate([rows, rows]))
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    product = jax.lax.dot_general(rows, kernel, axes, preferred_element_type=dtype)
    return product[:count].reshape(*x.shape[:-1], product.shape[1])


def argument(array):
    """A NumPy array as an argument of a compiled function.

    On JAX the array itself: made a tensor by itself, each new shape would compile a program of its own.
    """
    return array if NAME == "jax" else keras.ops.convert_to_tensor(array)


def value_of(x):
    """A tensor for a tensor, array or variable. (Keras hands on TensorFlow's variables, which no gradient may be of.)"""
    x = keras.ops.convert_to_tensor(x)
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(x)
    return x


def write_slice(buffer, update, start):
    """Write `update` [B, T, ...] into `buffer` [B, S, ...] from position `start` of axis 1, and return the result.

    The buffer is consumed: PyTorch writes in place (Keras's `slice_update` would copy the whole buffer for every token
    and layer), XLA reuses the memory of a loop variable or a donated argument.
    """
    if NAME == "torch":
        # What comes out of `repeat` may have rows that share memory.
        start, buffer = int(start), buffer.contiguous()
        buffer[:, start : start + update.shape[1]] = update
        return buffer
    return keras.ops.slice_update(buffer, [0, start] + [0] * (len(buffer.shape) - 2), update)


def compile_function(function, variables, donate=()):
    """Compile `function(*args)`, which reads Keras `variables` and changes none, for repeated calls.

    Args:
        function: takes and returns nested tensors; every tensor it depends on is an argument or one of `variables`.
        variables: list of `keras.Variable`, read anew at each call.
        donate: positions of arguments whose memory the result may reuse (JAX); the caller must not use them again.

    Returns:
        A function with the same arguments. It compiles once for each combination of argument shapes and dtypes.
    """
    if NAME == "jax":
        import jax

        def stateless(values, *args):
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return function(*args)

        program = jax.jit(stateless, donate_argnums=tuple(i + 1 for i in donate))
        return lambda *args: program([v.value for v in variables], *args)

    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)

    import torch

    return torch.no_grad()(function)


def update_variables(model):
    """In the middle of an epoch of `fit`, give a model's variables the values that JAX keeps apart from them."""
    if NAME == "jax":
        model.jax_state_sync()


def seed_global_generator(seed):
    """Seed, from 0 to 2**64 - 1, what layers without a seed of their own draw dropout from on PyTorch.

    Other backends keep all their random numbers in the state of layers.
    """
    if NAME == "torch":
        import torch

        torch.manual_seed(seed)


def trace_once(layers):
    """Layers that differ in nothing but the values of their variables, as functions that call them.

    On JAX they are traced once for all: tracing takes most of a first call whose program is compiled already.
    Elsewhere, and where the variables' shapes or dtypes differ, the layers themselves.
    """
    kinds = {tuple((v.name, tuple(v.shape), v.dtype) for v in layer.variables) for layer in layers}
    if NAME != "jax" or len(kinds) > 1:
        return layers
    import jax

    @jax.jit
    def call_first(values, args, kwargs):
        with keras.StatelessScope(state_mapping=zip(layers[0].variables, values, strict=True)):
            return layers[0](*args, **kwargs)

    def function_of(layer):
        return lambda *args, **kwargs: call_first([v.value for v in layer.variables], args, kwargs)

    return [function_of(layer) for layer in layers]


def cache_compilations(folder):
    """Keep compiled programs in `folder` for the next process (JAX); what the user has configured stands."""
    if NAME == "jax":
        import jax

        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


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
        raise ValueError(f"A `tf.data.Dataset` needs the TensorFlow backend. Received: the backend {NAME!r}")
    import tensorflow as tf

    signature = keras.tree.map_structure(lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), structure)
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

    outputs = tf.numpy_function(lambda *args: function(*args), inputs, [tf.as_dtype(d) for d in dtypes])
    return [tf.ensure_shape(output, shape) for output, shape in zip(outputs, shapes, strict=True)]
