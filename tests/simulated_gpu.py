"""A GPU for PyTorch that is simulated on the CPU: it computes the same, and is as strict about where tensors are.

Tensors that are made on "cuda" are `GpuTensor`s. An operation on them and on tensors of the CPU raises, and so does
reading their memory. `start` has to run before Keras is imported.
"""

import os

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_}
"""Operations that take tensors of both devices. The indices of a tensor on a GPU may be on the CPU."""
NO_SCALARS = {
    aten.cat,
    aten.stack,
    aten.gather,
    aten.scatter_add_,
    aten.index_copy_,
    aten.index_select,
}
"""Operations for which a single number on the CPU is on the wrong device, too."""


class GpuTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", 0))

    def numpy(self, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"GpuTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found, others = {}, []

        def unwrap(x):
            if isinstance(x, GpuTensor):
                found[id(x.inner)] = x
                return x.inner
            if isinstance(x, torch.Tensor):
                others.append(x)
            return x

        inner_args, inner_kwargs = tree_map(unwrap, (args, kwargs))
        packet = function.overloadpacket
        is_scalar = packet not in NO_SCALARS and all(x.ndim == 0 for x in others)
        if others and packet not in COPIES and not is_scalar:
            raise RuntimeError(
                f"Expected all tensors on one device, but found cuda:0 and cpu: {function}"
            )
        if packet is aten.index and not isinstance(args[0], GpuTensor):
            raise RuntimeError("indices should be on the CPU, as the indexed tensor is")
        result = function(*inner_args, **inner_kwargs)
        if packet is aten.copy_:
            return args[0]
        # The result of an operation in place is its argument.
        return tree_map(lambda x: found.get(id(x), x) if id(x) in found else on_gpu(x), result)


def on_gpu(x):
    return GpuTensor(x.detach()) if type(x) is torch.Tensor else x


class Device(TorchFunctionMode):
    """Makes a `GpuTensor` of what is made on, or moved to, "cuda"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cpu:
            return _on_cpu(args[0])
        if function is torch.Tensor.to:
            x, *others = [*args, *kwargs.values()]
            devices = [value for value in others if isinstance(value, (str, torch.device))]
            dtypes = [value for value in others if isinstance(value, torch.dtype)]
            if not devices:
                return function(*args, **kwargs)
            x = function(x, *dtypes) if dtypes else x
            return on_gpu(x) if _is_gpu(devices[0]) else _on_cpu(x)
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
            return tree_map(on_gpu, function(*args, **kwargs))
        return function(*args, **kwargs)


def _on_cpu(x):
    return x.inner.detach().clone() if isinstance(x, GpuTensor) else x


def _is_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def start():
    """Let Keras compute on the simulated GPU, in this process from here on."""
    os.environ["KERAS_BACKEND"], os.environ["KERAS_TORCH_DEVICE"] = "torch", "cuda"
    # A mode is not active inside a function that it handles; layers are recomputed inside these.
    torch.autograd.has_torch_function = lambda tensors: False
    torch.Tensor.backward = torch.autograd.backward
    # Its random numbers are the CPU's.
    torch.utils.checkpoint._infer_device_type = lambda *args: "cpu"
    generator = torch.Generator

    class Generator(generator):
        def __new__(cls, device="cpu"):
            return generator.__new__(generator, device="cpu")

    torch.Generator = Generator
    Device().__enter__()
