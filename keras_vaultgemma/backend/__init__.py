"""The one package that asks which Keras backend runs; the others call what it exports.

Importing it also imports keras-hub for the rest of the package, without letting it pull in TensorFlow on JAX and
PyTorch: keras-hub imports TensorFlow wherever that is installed, which costs seconds and a gigabyte, and needs it for
nothing that this package uses.
"""

from keras_vaultgemma.backend.choice import BACKENDS, NAME, without_tensorflow
from keras_vaultgemma.backend.compilation import (
    COMPILES_LAYERS,
    cache_compilations,
    compile_function,
    compile_step,
    seed_global_generator,
    trace_once,
    update_variables,
)
from keras_vaultgemma.backend.devices import check_that_it_distributes, gathered, in_shares, other_executor
from keras_vaultgemma.backend.gradients import add, gradients, scaled
from keras_vaultgemma.backend.loops import while_loop
from keras_vaultgemma.backend.memory import return_freed_memory, return_memory_of_compilations
from keras_vaultgemma.backend.noise import normal
from keras_vaultgemma.backend.products import ATTENDS_IN_ONE, expanded, int8_matmul, matmul, take_rows
from keras_vaultgemma.backend.recomputation import fused, recomputed
from keras_vaultgemma.backend.tensorflow_data import (
    in_tensorflow_graph,
    is_symbolic_tensorflow,
    is_tensorflow,
    tensorflow_dataset,
)
from keras_vaultgemma.backend.tensors import after, argument, from_numpy, is_argmax, value_of, write_slice, zeros
from keras_vaultgemma.backend.train_step import train_step

__all__ = [
    "ATTENDS_IN_ONE",
    "BACKENDS",
    "COMPILES_LAYERS",
    "NAME",
    "add",
    "after",
    "argument",
    "cache_compilations",
    "check_that_it_distributes",
    "compile_function",
    "compile_step",
    "expanded",
    "from_numpy",
    "fused",
    "gathered",
    "gradients",
    "in_shares",
    "in_tensorflow_graph",
    "int8_matmul",
    "is_argmax",
    "is_symbolic_tensorflow",
    "is_tensorflow",
    "matmul",
    "normal",
    "other_executor",
    "recomputed",
    "return_freed_memory",
    "return_memory_of_compilations",
    "scaled",
    "seed_global_generator",
    "take_rows",
    "tensorflow_dataset",
    "trace_once",
    "train_step",
    "update_variables",
    "value_of",
    "while_loop",
    "without_tensorflow",
    "write_slice",
    "zeros",
]
