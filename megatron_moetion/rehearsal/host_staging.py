"""Stands in for gloo's access to a GPU where it has none: such tensors go through host memory.

Needed where several ranks share one GPU, which NCCL refuses. Gloo (torch 2.11 and 2.13) by itself
takes CUDA tensors in all_reduce, broadcast, reduce, all_gather, gather, scatter, all_to_all_single
and reduce_scatter_tensor (an all_reduce inside). It hands device pointers to the CPU in send and
receive and in coalesced all-gathers, and refuses coalesced all-reduces: those are staged here,
underneath torch.distributed's own functions, so that whoever wraps those sees nothing of it.

Staging blocks the host until the device is done. Nothing timed on it says anything about NCCL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d

_Delivery = tuple[torch.Tensor, torch.Tensor]
"""(tensor on the device, what arrived for it in host memory)."""


class StagedWork:
    """A collective on host memory that delivers to the device when it is waited for.

    Everything but waiting is the real work's own.
    """

    def __init__(self, work: Any, deliveries: Sequence[_Delivery]) -> None:
        self._work = work
        self._deliveries = list(deliveries)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As the real one; afterwards the current stream has the results in the device tensors."""
        result = self._work.wait(*args, **kwargs)
        while self._deliveries:
            target, arrived = self._deliveries.pop()
            # Received activations require gradients; what fills them is no operation on them.
            target.detach().copy_(arrived)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Its contents in host memory of its own; waits for the current stream."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _host_room(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _send(call: Callable[..., Any], tensors: list[torch.Tensor], *rest: Any, **options: Any) -> Any:
    return call([_host_copy(t) for t in tensors], *rest, **options)


def _receive(
    call: Callable[..., Any], tensors: list[torch.Tensor], *rest: Any, **options: Any
) -> StagedWork:
    arriving = [_host_room(t) for t in tensors]
    return StagedWork(call(arriving, *rest, **options), list(zip(tensors, arriving, strict=True)))


def _reduce(
    call: Callable[..., Any], tensors: list[torch.Tensor], *rest: Any, **options: Any
) -> StagedWork:
    staged = [_host_copy(t) for t in tensors]
    return StagedWork(call(staged, *rest, **options), list(zip(tensors, staged, strict=True)))


def _gather(
    call: Callable[..., Any],
    outputs: list[torch.Tensor],
    inputs: list[torch.Tensor],
    *rest: Any,
    **options: Any,
) -> StagedWork:
    arriving = [_host_room(t) for t in outputs]
    work = call(arriving, [_host_copy(t) for t in inputs], *rest, **options)
    return StagedWork(work, list(zip(outputs, arriving, strict=True)))


STAGED: dict[str, Callable[..., Any]] = {
    "send": _send,
    "recv": _receive,
    "recv_anysource": _receive,
    "allreduce_coalesced": _reduce,
    "allgather_into_tensor_coalesced": _gather,
    # Its name from torch 2.13 on.
    "all_gather_single_coalesced": _gather,
}
"""Methods of `ProcessGroup` that gloo cannot do with CUDA tensors, and how each is staged."""


def _through_host(
    method: Callable[..., Any], stage: Callable[..., Any], device_type: str
) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(group: Any, tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(method, group)
        device = tensors[0].device
        # Torch's fake groups, on which a replacement sets up, leave their tensors alone.
        if device.type != device_type or group._get_backend(device).name() != "gloo":
            return call(tensors, *args, **kwargs)
        return stage(call, tensors, *args, **kwargs)

    return wrapper


def install(device_type: str = "cuda") -> None:
    """Wraps the methods of torch's `ProcessGroup` for good.

    Args:
        device_type: tensors of this type are staged; tests stage CPU tensors.
    """
    group_class: Any = _distributed_c10d.ProcessGroup
    for name, stage in STAGED.items():
        method = getattr(group_class, name, None)
        if method is not None:
            setattr(group_class, name, _through_host(method, stage, device_type))
