"""Compilation of functions that read Keras variables."""

import contextlib
import functools

import keras

from keras_vaultgemma.backend.selection import NAME
from keras_vaultgemma.backend.tensors import value_of


def compile_function(function, variables, donate=(), jit_compile=True):
    """Compile a function that reads Keras variables and changes none.

    It is compiled once for each combination of argument shapes and dtypes, and reads the variables'
    current values at each call. On PyTorch it runs uncompiled, without gradients.

    Args:
        function: callable. Takes and returns nested tensors; every tensor that it depends on is an
            argument or the value of one of `variables`.
        variables: list of `keras.Variable`.
        donate: tuple of ints. Positions of arguments whose memory the result may reuse (JAX); the
            caller must not use them again. Defaults to none.
        jit_compile: bool. True if XLA compiles a float32 function on TensorFlow, too, which takes a
            second at the size of VaultGemma 1B and does not speed up matmuls of many rows. Defaults
            to True.

    Returns:
        A function of the same arguments.
    """
    if NAME == "jax":
        import jax

        def stateless(values, *args):
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return function(*args)

        compiled = jax.jit(stateless, donate_argnums=tuple(i + 1 for i in donate))
        return lambda *args: compiled([v.value for v in variables], *args)

    if NAME == "tensorflow":
        import tensorflow as tf

        is_narrow = any(v.dtype in ("bfloat16", "float16", "int8") for v in variables)
        return tf.function(function, jit_compile=jit_compile or is_narrow, autograph=False)

    import torch

    return torch.no_grad()(function)


def is_tracing():
    """True inside a function that JAX or TensorFlow compiles, where tensors have no values."""
    if NAME == "jax":
        import jax

        return isinstance(jax.numpy.zeros(()), jax.core.Tracer)
    if NAME == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


def in_32_bits():
    """Return a context in which JAX's default integers have 32 bits, as without `JAX_ENABLE_X64=1`.

    keras-hub's samplers that run their own loop mix default integers with int32 in one list of
    indices, which JAX rejects.
    """
    if NAME == "jax":
        import jax

        return jax.enable_x64(False)
    return contextlib.nullcontext()


def _signature(layer):
    return tuple((v.name, tuple(v.shape), v.dtype) for v in layer.variables)


def trace_once(function, layers):
    """Return one function for each layer, all of which share a single trace.

    Tracing takes most of a first call whose executable is in the cache of compilations. The layers
    must differ in nothing but the values of their variables. Where shapes or dtypes differ, on
    PyTorch and in TensorFlow's eager mode, the functions call `function` directly.

    Args:
        function: callable that takes a layer and the arguments of a call.
        layers: list of `keras.layers.Layer`.

    Returns:
        List of functions of `(*args, **kwargs)`, one for each layer.
    """
    functions = [functools.partial(function, layer) for layer in layers]
    if NAME == "torch" or len({_signature(layer) for layer in layers}) > 1:
        return functions
    if NAME == "jax":
        import jax

        compiled = jax.jit
    else:
        import tensorflow as tf

        if tf.executing_eagerly():
            return functions
        compiled = functools.partial(tf.function, autograph=False)

    @compiled
    def call_first(values, args, kwargs):
        with keras.StatelessScope(state_mapping=zip(layers[0].variables, values, strict=True)):
            return function(layers[0], *args, **kwargs)

    def call_of(layer):
        return lambda *args, **kwargs: call_first(
            [value_of(v) for v in layer.variables], args, kwargs
        )

    return [call_of(layer) for layer in layers]


def cache_compilations(folder):
    """Cache compiled functions in `folder` for later processes (JAX), unless the user set a cache.

    Args:
        folder: path. Created by JAX if it does not exist.
    """
    if NAME == "jax":
        import jax

        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def update_variables(model):
    """Assign values that `fit` holds outside the model during an epoch (JAX) to its variables."""
    if NAME == "jax":
        model.jax_state_sync()


def seed_global_generator(seed):
    """Seed PyTorch's global generator, which layers without a seed of their own draw dropout from.

    Other backends have no such generator: their random layers hold all of their state.

    Args:
        seed: int from 0 to 2**64 - 1, or an integer scalar tensor.
    """
    if NAME == "torch":
        import torch

        torch.manual_seed(int(seed))
