"""Functions whose implementation depends on the Keras backend.

No other package asks which backend runs.

Importing it also imports Keras and keras-hub, which do not import TensorFlow on JAX and PyTorch
(`TensorFlowGuard`).
"""

# First, because it selects the backend before Keras is imported.
from keras_vaultgemma.backend.selection import BACKENDS, NAME

# isort: split
from keras_vaultgemma.backend.attention import HAS_FUSED_ATTENTION, fused_attention
from keras_vaultgemma.backend.autodiff import (
    add_in_place,
    block_size,
    fused,
    gradients,
    loop_in_blocks,
    multiply_no_nan,
    remat,
    rows_with_own_weights,
    while_loop,
    without_gradients,
)
from keras_vaultgemma.backend.blocks import (
    add_float64_noise,
    in_blocks,
    in_row_blocks,
    positions,
    rotate_left,
)
from keras_vaultgemma.backend.compile import (
    cache_compilations,
    compile_function,
    in_32_bits,
    is_tracing,
    seed_global_generator,
    trace_once,
    update_variables,
)
from keras_vaultgemma.backend.int8_cpu import int8_matmul
from keras_vaultgemma.backend.matmul import matmul, sum_of_squares, take_rows, thin_matmul
from keras_vaultgemma.backend.recording import record_step
from keras_vaultgemma.backend.saved_model import (
    SAVED_MODEL_KINDS,
    load_saved_model,
    text_function,
    write_saved_model,
)
from keras_vaultgemma.backend.sharding import (
    all_gathered,
    check_distribution_support,
    data_devices,
    fold_over_devices,
    from_processes,
    is_first_process,
    one_of_equal,
    own_parts,
    per_device,
    process_count,
    sum_over_devices,
    unsupported_executor,
)
from keras_vaultgemma.backend.tensors import (
    add_at,
    as_argument,
    from_numpy,
    is_argmax,
    known_length,
    log_softmax,
    numpy_view,
    reshape,
    rms_normalize,
    schedule_after,
    top_k,
    value_of,
    write_rows,
    write_slice,
    zeros,
)
from keras_vaultgemma.backend.tf_data import (
    is_symbolic_tensorflow,
    is_tensorflow,
    tensorflow_dataset,
)
from keras_vaultgemma.backend.tf_text import (
    call_in_graph,
    empty_texts_like,
    pack_pairs_in_graph,
    pad_in_graph,
    sentencepiece_in_graph,
    tokenize_in_graph,
)
from keras_vaultgemma.backend.training import (
    apply_gradients,
    loss_gradients,
    test_step,
    train_step,
)

__all__ = [
    "BACKENDS",
    "HAS_FUSED_ATTENTION",
    "NAME",
    "SAVED_MODEL_KINDS",
    "add_at",
    "add_float64_noise",
    "add_in_place",
    "all_gathered",
    "apply_gradients",
    "as_argument",
    "block_size",
    "cache_compilations",
    "call_in_graph",
    "check_distribution_support",
    "compile_function",
    "data_devices",
    "empty_texts_like",
    "fold_over_devices",
    "from_numpy",
    "from_processes",
    "fused",
    "fused_attention",
    "gradients",
    "in_32_bits",
    "in_blocks",
    "in_row_blocks",
    "int8_matmul",
    "is_argmax",
    "is_first_process",
    "is_symbolic_tensorflow",
    "is_tensorflow",
    "is_tracing",
    "known_length",
    "load_saved_model",
    "log_softmax",
    "loop_in_blocks",
    "loss_gradients",
    "matmul",
    "multiply_no_nan",
    "numpy_view",
    "one_of_equal",
    "own_parts",
    "pack_pairs_in_graph",
    "pad_in_graph",
    "per_device",
    "positions",
    "process_count",
    "record_step",
    "remat",
    "reshape",
    "rms_normalize",
    "rotate_left",
    "rows_with_own_weights",
    "schedule_after",
    "seed_global_generator",
    "sentencepiece_in_graph",
    "sum_of_squares",
    "sum_over_devices",
    "take_rows",
    "tensorflow_dataset",
    "test_step",
    "text_function",
    "thin_matmul",
    "tokenize_in_graph",
    "top_k",
    "trace_once",
    "train_step",
    "unsupported_executor",
    "update_variables",
    "value_of",
    "while_loop",
    "without_gradients",
    "write_rows",
    "write_saved_model",
    "write_slice",
    "zeros",
]
