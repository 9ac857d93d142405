"""Stands in for questions about devices and their memory."""

import functools
import os
from types import SimpleNamespace
from typing import Any

import torch

from megatron_moetion.rehearsal.answers import always

_CPU = torch.device("cpu")

_FIGURES = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "device_memory_used",
    "utilization",
    "temperature",
    "power_draw",
    "clock_rate",
)


def visible_gpus() -> int:
    """Number of GPUs this process could use, found without initialising CUDA."""
    return torch.cuda.device_count()


class _Device:
    """``torch.cuda.device(...)``: entering it selects nothing, there is one CPU."""

    def __init__(self, device: object = None) -> None:
        self.idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _properties() -> SimpleNamespace:
    # Compute capability 8.0 is the least that the host accepts for BF16 everywhere.
    return SimpleNamespace(
        name="CPU (rehearsal)",
        major=8,
        minor=0,
        total_memory=_total_memory_bytes(),
        multi_processor_count=os.cpu_count() or 1,
        warp_size=32,
        is_integrated=1,
    )


class _Zeros(dict[str, int]):
    """Memory statistics: every counter that is asked for reads 0."""

    def __missing__(self, key: str) -> int:
        return 0


def install() -> None:
    """Answer device and memory queries for one CPU per rank."""
    cuda: Any = torch.cuda
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    answers: dict[str, Any] = {
        "is_available": always(True),
        "is_initialized": always(True),
        "init": always(None),
        "_lazy_init": always(None),
        "_lazy_call": lambda callback, **kwargs: callback(),
        "_is_in_bad_fork": always(False),
        # The host passes it on as `device=`, which a device object serves as well as an index.
        "current_device": always(_CPU),
        "device_count": always(local_ranks),
        "set_device": always(None),
        "device": _Device,
        "get_device_name": always(_properties().name),
        "get_device_properties": always(_properties()),
        "get_device_capability": always((_properties().major, _properties().minor)),
        "is_bf16_supported": always(True),
        "get_arch_list": always([]),
        "synchronize": always(None),
        "empty_cache": always(None),
        "ipc_collect": always(None),
        "mem_get_info": always((_total_memory_bytes(), _total_memory_bytes())),
        "memory_stats": lambda device=None: _Zeros(),
        "memory_summary": always(""),
        "memory_snapshot": always([]),
        "check_error": always(None),
        "cudart": lambda: SimpleNamespace(cudaProfilerStart=always(0), cudaProfilerStop=always(0)),
    }
    for name in _FIGURES:
        answers[name] = always(0)
    for name in ("reset_peak_memory_stats", "reset_max_memory_allocated"):
        answers[name] = always(None)
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    for name in ("memory_stats", "memory_allocated", "max_memory_allocated", "empty_cache"):
        setattr(cuda.memory, name, answers[name])
    accelerator: Any = torch.accelerator
    accelerator.current_device_index = always(0)
    accelerator.synchronize = always(None)


def share_one() -> None:
    """Let every local rank use GPU 0; everything else about it is the real thing."""
    cuda: Any = torch.cuda
    select = cuda.set_device
    cuda.set_device = lambda device: select(0)
