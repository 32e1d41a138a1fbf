"""The one package that asks which Keras backend runs; the others call what it exports.

Importing it also imports keras-hub for the rest of the package, without letting it pull in TensorFlow on JAX and
PyTorch: keras-hub imports TensorFlow wherever that is installed, which costs seconds and a gigabyte, and needs it for
nothing that this package uses.
"""

# First, because it selects the backend before Keras is imported.
from keras_vaultgemma.backend.selection import BACKENDS, NAME, without_tensorflow

# isort: split
from keras_vaultgemma.backend.autodiff import (
    add_in_place,
    fused,
    gradients,
    multiply_no_nan,
    remat,
    while_loop,
)
from keras_vaultgemma.backend.compile import (
    COMPILES_LAYERS,
    cache_compilations,
    compile_function,
    compile_step,
    seed_global_generator,
    trace_once,
    update_variables,
)
from keras_vaultgemma.backend.matmul import ATTENDS_IN_ONE, expanded, int8_matmul, matmul, take_rows
from keras_vaultgemma.backend.memory import return_freed_memory, return_memory_of_compilations
from keras_vaultgemma.backend.sharding import (
    all_gathered,
    check_distribution_support,
    per_device,
    unsupported_executor,
)
from keras_vaultgemma.backend.tensors import (
    as_argument,
    from_numpy,
    is_argmax,
    schedule_after,
    value_of,
    write_slice,
    zeros,
)
from keras_vaultgemma.backend.tf_data import (
    in_tensorflow_graph,
    is_symbolic_tensorflow,
    is_tensorflow,
    tensorflow_dataset,
)
from keras_vaultgemma.backend.training import loss_gradients, normal, test_step, train_step

__all__ = [
    "ATTENDS_IN_ONE",
    "BACKENDS",
    "COMPILES_LAYERS",
    "NAME",
    "add_in_place",
    "all_gathered",
    "as_argument",
    "cache_compilations",
    "check_distribution_support",
    "compile_function",
    "compile_step",
    "expanded",
    "from_numpy",
    "fused",
    "gradients",
    "in_tensorflow_graph",
    "int8_matmul",
    "is_argmax",
    "is_symbolic_tensorflow",
    "is_tensorflow",
    "loss_gradients",
    "matmul",
    "multiply_no_nan",
    "normal",
    "per_device",
    "remat",
    "return_freed_memory",
    "return_memory_of_compilations",
    "schedule_after",
    "seed_global_generator",
    "take_rows",
    "tensorflow_dataset",
    "test_step",
    "trace_once",
    "train_step",
    "unsupported_executor",
    "update_variables",
    "value_of",
    "while_loop",
    "without_tensorflow",
    "write_slice",
    "zeros",
]
