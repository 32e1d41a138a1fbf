"""Recording of the operations of a decoding step, to replay them without Python (PyTorch).

Without it Python takes a third of a token's time: VaultGemma 1B in float32 decodes 4.4 tokens/s
instead of 5.9 on 2 Intel cores, where the memory bandwidth allows 7.1. `torch.compile` would do the
same with public API, but needs a C++ compiler and minutes of compilation. Remove this module once
PyTorch ships a way to replay operations from a plain wheel.
"""

import functools
import warnings

import keras

from keras_vaultgemma.backend.selection import NAME

EAGER_CALLS = 16
"""Calls of a step before it is recorded, because recording takes about as long as they save."""


def record_step(function, variables):
    """Prepare a function that Python calls once per token for replay without Python.

    JAX and TensorFlow compile the loop around the function, which is returned as it is.

    Args:
        function: callable that takes and returns nested tensors. It may change its arguments in
            place. What it does must depend on shapes and dtypes alone, and it must convert no
            tensor to a Python number.
        variables: list of `keras.Variable` that it reads.

    Returns:
        A function without arguments. Call it where a loop begins: it returns `function`, recorded
        for each combination of shapes, for use while the variables keep their values.
    """
    if NAME != "torch":
        return lambda: function
    import torch

    calls, recordings = {}, {}

    def begin():
        # Once for a loop, because reading 190 variables takes a millisecond.
        values = [v.value.detach() for v in variables]

        @torch.no_grad()
        def call(*args):
            leaves = keras.tree.flatten(args)
            key = tuple((tuple(x.shape), x.dtype) for x in leaves)
            calls[key] = calls.get(key, 0) + 1
            if calls[key] <= EAGER_CALLS:
                return function(*args)
            if key in recordings:
                recording, structure = recordings[key]
                return keras.tree.pack_sequence_as(structure, recording(values + leaves))

            def stateless(tensors):
                mapping = zip(variables, tensors[: len(variables)], strict=True)
                with keras.StatelessScope(state_mapping=mapping):
                    return function(*keras.tree.pack_sequence_as(args, tensors[len(variables) :]))

            recording, result = Recording.of(stateless, values + leaves)
            recordings[key] = recording, keras.tree.map_structure(lambda x: None, result)
            return result

        return call

    return begin


class Recording:
    """The operations of a function of tensors, which replays them for tensors of the same shapes.

    Each operation is stored with its arguments: tensors that the function was given or computed by
    index, others as constants. At the first replay, PyTorch's tracer converts the operations to a
    TorchScript function, whose interpreter runs without Python. (The tracer alone would pass sizes
    as tensors, which Keras's layers do not accept.) No tensor is stored but constants.
    """

    def __init__(self):
        self._operations, self._results, self._compiled = [], [], None

    @classmethod
    def of(cls, function, tensors):
        """Call `function` once with a list of tensors, and record it.

        Returns:
            Tuple of the `Recording` and the result of the call.
        """
        from torch.utils._python_dispatch import TorchDispatchMode

        recording, indices = cls(), {id(tensor): i for i, tensor in enumerate(tensors)}
        alive = list(tensors)  # so that no two have the same id

        def index(x):
            return _Index(indices[id(x)]) if id(x) in indices else x

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                kwargs = kwargs or {}
                found = operation(*args, **kwargs)
                recording._operations.append((operation, *_map(index, (args, kwargs))))
                for x in _as_list(found):
                    # The result of an in-place operation gets a new index for the same tensor.
                    indices[id(x)] = len(alive)
                    alive.append(x)
                return found

        with Recorder():
            result = function(tensors)
        recording._results = [indices[id(x)] for x in keras.tree.flatten(result)]
        return recording, result

    def __call__(self, tensors):
        """Return the flat list of results for tensors like those that were recorded."""
        import torch

        if self._compiled is not None:
            return self._compiled(*tensors)
        results = []

        def replay(*tensors):
            results.append(self._replay(tensors))
            return results[0]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer is deprecated
            self._compiled = torch.jit.trace(replay, tuple(tensors), check_trace=False)
        self._operations = []
        return results.pop()

    def _replay(self, tensors):
        known = list(tensors)

        def value(x):
            return known[x] if isinstance(x, _Index) else x

        for operation, args, kwargs in self._operations:
            args, kwargs = _map(value, (args, kwargs))
            operation, args = _traceable(operation, args)
            known += _as_list(operation(*args, **kwargs))
        return tuple(known[i] for i in self._results)


class _Index(int):
    """Index of a tensor, to tell it from an integer argument."""


def _traceable(operation, args):
    """Replace oneDNN's matmul, whose list of `Scalar?` the tracer does not know."""
    import torch

    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if onednn is None or operation is not onednn.default:
        return operation, args
    return _scripted_onednn(), args[:2]


@functools.cache
def _scripted_onednn():
    import torch

    def matmul(x: torch.Tensor, weight: torch.Tensor):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return torch.jit.script(matmul)


def _as_list(results):
    return results if isinstance(results, (tuple, list)) else [results]


def _map(function, arguments):
    """Apply a function to the leaves of nested lists, tuples and dicts."""
    if isinstance(arguments, (list, tuple)):
        return type(arguments)([_map(function, x) for x in arguments])
    if isinstance(arguments, dict):
        return {name: _map(function, x) for name, x in arguments.items()}
    return function(arguments)
