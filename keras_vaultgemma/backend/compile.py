"""Compiled functions that read Keras variables, and the state that compiled steps keep apart from them."""

import functools

import keras

from keras_vaultgemma.backend.recording import Recording
from keras_vaultgemma.backend.selection import NAME
from keras_vaultgemma.backend.tensors import value_of

EAGER_CALLS = 16
"""Calls of a step before it is recorded on PyTorch, which takes about as long as the calls it speeds up by then."""


COMPILES_LAYERS = NAME == "jax"
"""Whether a program of one layer, called for every layer, is better than one of all layers. That is 4 % faster for 16
tokens (VaultGemma's size), but XLA compiles it in 0.9 s instead of 0.3 s, and takes 0.3 s longer to read it back from a
disk and to prepare it. On PyTorch and TensorFlow, which compile nothing for it, it is 8 and 20 % faster."""


def compile_function(function, variables, donate=(), fused=True, layers=None):
    """Compile `function(*args)`, which reads Keras `variables` and changes none, for repeated calls.

    Args:
        function: takes and returns nested tensors; every tensor it depends on is an argument or one of `variables`.
        variables: list of `keras.Variable`, read anew at each call.
        donate: positions of arguments whose memory the result may reuse (JAX); the caller must not use them again.
        fused: whether XLA compiles a float32 program on TensorFlow, too. Products of many rows take no less time in it,
            and it takes a second to compile (VaultGemma's size).
        layers: Keras layers whose variables no other layer has. The function is then `function(layer, *args)`, compiled
            once for all layers that differ in nothing but the values of their variables.

    Returns:
        A function with the same arguments, or a list of functions of `args`, one for each layer. It compiles once for
        each combination of argument shapes and dtypes.
    """
    is_narrow = any(v.dtype in ("bfloat16", "float16", "int8") for v in variables)
    if layers is not None:
        return _compile_layers(function, variables, layers, donate=donate, fused=fused)
    if NAME == "jax":
        return _compile_stateless(function, variables, donate)(variables)

    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=fused or is_narrow)

    import torch

    return torch.no_grad()(function)


def _compile_layers(function, variables, layers, donate, fused):
    if not COMPILES_LAYERS:
        options = dict(donate=donate, fused=fused)
        return [
            compile_function(functools.partial(function, layer), variables, **options)
            for layer in layers
        ]
    of_layers = {id(v) for layer in layers for v in layer.variables}
    shared = [v for v in variables if id(v) not in of_layers]
    programs, functions = {}, []
    for layer in layers:
        kind = _kind(layer)
        if kind not in programs:
            of_first = functools.partial(function, layer)
            programs[kind] = _compile_stateless(of_first, shared + layer.variables, donate)
        functions.append(programs[kind](shared + layer.variables))
    return functions


def _compile_stateless(function, variables, donate):
    """Compile a function on JAX for variables like these: a function of variables that returns one that reads those."""
    import jax

    def stateless(values, *args):
        with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
            return function(*args)

    program = jax.jit(stateless, donate_argnums=tuple(i + 1 for i in donate))
    return lambda variables: lambda *args: program([v.value for v in variables], *args)


def _kind(layer):
    return tuple((v.name, tuple(v.shape), v.dtype) for v in layer.variables)


def compile_step(function, variables):
    """Compile the body of a loop where Python runs the loop: on PyTorch. Elsewhere the function itself.

    There Keras's layers take 2 ms of Python for every decoder block and token, a third of the time of a token. So the
    operations are recorded (recording.py), for each combination of shapes, and played back without it.

    Args:
        function: as for `compile_function`; it may change its arguments in place. No tensor of it may become a Python
            number, and nothing but shapes and dtypes may decide what it does.
        variables: as for `compile_function`.

    Returns:
        A function without arguments that begins a loop: it returns the compiled `function` for that loop, within which
        the variables stay as they are.
    """
    if NAME != "torch":
        return lambda: function
    import torch

    calls, programs = {}, {}

    def begin():
        # 190 tensors of VaultGemma 1B: for each token this would take a millisecond.
        values = [v.value.detach() for v in variables]

        @torch.no_grad()
        def call(*args):
            leaves = keras.tree.flatten(args)
            key = tuple((tuple(x.shape), x.dtype) for x in leaves)
            calls[key] = calls.get(key, 0) + 1
            if calls[key] <= EAGER_CALLS:
                return function(*args)
            if key in programs:
                program, structure = programs[key]
                return keras.tree.pack_sequence_as(structure, program(values + leaves))

            def stateless(tensors):
                with keras.StatelessScope(
                    state_mapping=zip(variables, tensors[: len(variables)], strict=True)
                ):
                    return function(*keras.tree.pack_sequence_as(args, tensors[len(variables) :]))

            program, result = Recording.of(stateless, values + leaves)
            programs[key] = program, keras.tree.map_structure(lambda x: None, result)
            return result

        return call

    return begin


def trace_once(layers):
    """Layers that differ in nothing but the values of their variables, as functions that call them.

    On JAX, and in a compiled function of TensorFlow, they are traced once for all: tracing takes most of a first call
    whose program is compiled already. Elsewhere, and where the variables' shapes or dtypes differ, the layers
    themselves.
    """
    if len({_kind(layer) for layer in layers}) > 1:
        return layers
    if NAME == "jax":
        import jax

        compiled = jax.jit
    elif NAME == "tensorflow":
        import tensorflow as tf

        if tf.executing_eagerly():
            return layers
        compiled = functools.partial(tf.function, autograph=False)
    else:
        return layers

    @compiled
    def call_first(values, args, kwargs):
        with keras.StatelessScope(state_mapping=zip(layers[0].variables, values, strict=True)):
            return layers[0](*args, **kwargs)

    def function_of(layer):
        return lambda *args, **kwargs: call_first(
            [value_of(v) for v in layer.variables], args, kwargs
        )

    return [function_of(layer) for layer in layers]


def cache_compilations(folder):
    """Keep compiled programs in `folder` for the next process (JAX); what the user has configured stands."""
    if NAME == "jax":
        import jax

        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def update_variables(model):
    """In the middle of an epoch of `fit`, give a model's variables the values that JAX keeps apart from them."""
    if NAME == "jax":
        model.jax_state_sync()


def seed_global_generator(seed):
    """Seed, from 0 to 2**64 - 1, what layers without a seed of their own draw dropout from on PyTorch.

    Other backends keep all their random numbers in the state of layers.

    Args:
        seed: int, or an integer scalar tensor.
    """
    if NAME == "torch":
        import torch

        torch.manual_seed(int(seed))
