"""What this rank's device can do, measured in a moment before training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# Parts of it carry no types.
_cuda: Any = torch.cuda
SAMPLE_BYTES = 64 << 20
REPEATS = 3


def copy_rate(device: torch.device, nbytes: int = SAMPLE_BYTES) -> float:
    """Bytes per second from the device to host memory, page-locked where the device is a GPU."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return nbytes / _shortest(device, lambda: target.copy_(source, non_blocking=True))


def multiply_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of two square matrices."""
    size = 8192 if device.type == "cuda" else 512
    factor = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty_like(factor)
    return 2 * size**3 / _shortest(device, lambda: torch.mm(factor, factor, out=product))


def _shortest(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs; the first ones warm up."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            _cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
