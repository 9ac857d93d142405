"""Stands in for NCCL: process groups that ask for it get gloo."""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


def _without_nccl(host: Callable[..., Any]) -> Callable[..., Any]:
    """``host`` (``init_process_group`` or ``new_group``) with gloo in NCCL's place."""

    @functools.wraps(host)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        # Both speak about NCCL communicators and a real device.
        kwargs.pop("pg_options", None)
        kwargs.pop("device_id", None)
        return host(*args, **kwargs)

    return wrapper


def install() -> None:
    """Wrap the two functions that create process groups, under every name they have."""
    for name in ("init_process_group", "new_group"):
        wrapper = _without_nccl(getattr(distributed_c10d, name))
        setattr(distributed_c10d, name, wrapper)
        setattr(dist, name, wrapper)
