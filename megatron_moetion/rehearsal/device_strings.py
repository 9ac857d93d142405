"""Stands in for ``"cuda"`` as the name of a device, and for moving tensors to it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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


def _on_cpu(value: Any) -> Any:
    """The CPU for anything that names a CUDA device, else ``value`` itself."""
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return _CPU
    return value


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites device arguments of every torch function called on this thread."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
        return func(*args, **kwargs) if kwargs else func(*args)


# Never popped: it has to outlast `install`.
_mode: Any = _CudaMeansCpu()


def _stay() -> Callable[..., Any]:
    def same(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    return same


def install() -> None:
    """Push the mode for good and turn the moving methods into no-ops.

    The mode reaches the installing thread only; the host names devices nowhere else.
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
    _mode.__enter__()
