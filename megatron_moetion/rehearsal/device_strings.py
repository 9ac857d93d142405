"""Stands in for ``"cuda"`` as the name of a device, and for moving tensors to it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.jit import _builtins
from torch.utils._device import _device_constructors

from megatron_moetion.rehearsal.answers import always

_CPU = torch.device("cpu")

_TYPE_NAMES = {
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float32: "torch.cuda.FloatTensor",
    torch.float64: "torch.cuda.DoubleTensor",
    torch.int32: "torch.cuda.IntTensor",
    torch.int64: "torch.cuda.LongTensor",
    torch.uint8: "torch.cuda.ByteTensor",
    torch.bool: "torch.cuda.BoolTensor",
}

_LIKE = (
    "empty_like full_like ones_like rand_like randint_like randn_like zeros_like normal from_file"
)
"""What takes a device and is missing in torch's own list, `_device_constructors`."""

_METHODS = "to new new_empty new_empty_strided new_full new_ones new_tensor new_zeros is_pinned"
"""Methods of tensors that take a device; ``Module.to`` calls ``Tensor.to``."""


def _on_cpu(value: Any) -> Any:
    """The CPU for anything that names a CUDA device, else ``value`` itself."""
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return _CPU
    return value


def _cuda_means_cpu(host: Callable[..., Any]) -> Callable[..., Any]:
    """``host`` with the CPU in place of a CUDA device, however it is given."""

    @functools.wraps(host)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None:
                kwargs["device"] = _on_cpu(device)
            # Pinning needs CUDA; ordinary memory serves every reader here.
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        for value in args[1:]:
            if isinstance(value, (str, torch.device)):
                args = (args[0], *map(_on_cpu, args[1:]))
                break
        return host(*args, **kwargs)

    return wrapper


def _stay() -> Callable[..., Any]:
    def same(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    return same


def install() -> None:
    """Wrap what takes a device, on every thread, and turn the moving methods into no-ops.

    A mode that sees every call of torch would need no lists, and costs the host a lot: it reads
    attributes of tensors all the time, and each reading is such a call.
    """
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    host_type = tensor.type

    def type_or_cast(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The host's optimizers sort parameters by the CUDA name of their type.
        if dtype is None:
            return _TYPE_NAMES.get(self.dtype) or host_type(self)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return host_type(self, dtype, *args, **kwargs)

    tensor.type = type_or_cast
    tensor.cuda, tensor.pin_memory, module.cuda = _stay(), _stay(), _stay()
    tensor.record_stream = always(None)
    tensor.is_cuda = property(lambda self: True)
    for name in _METHODS.split():
        setattr(tensor, name, _cuda_means_cpu(getattr(tensor, name)))
    # Torch makes this set once, so its own modes (`with torch.device(...)`) go on knowing what
    # stands behind the wrappers.
    makers = _device_constructors() | {getattr(torch, name) for name in _LIKE.split()}
    known = {id(maker) for maker in makers}
    scripts: Any = _builtins
    for home in (torch, torch.fft, torch.nested):
        for name, function in list(vars(home).items()):
            if id(function) in known:
                wrapper = _cuda_means_cpu(function)
                setattr(home, name, wrapper)
                # Scripts that name it are compiled to the operator, as before.
                scripts._register_builtin(wrapper, scripts._find_builtin(function))
