"""Stands in for NCCL: process groups that ask for it get gloo, those of one world on one device."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, distributed_c10d


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


@functools.cache
def _device() -> Any:
    return ProcessGroupGloo.create_default_device()


class OneDevice(ProcessGroupGloo):
    """A gloo group on the one device of all groups of its world.

    Torch makes a device for each group, and each has a thread that wakes up a hundred times a
    second, whether there is anything to do or not: with the twenty groups of a small job and ranks
    that share a core, more than a tenth of all that is computed.

    A world that is made anew has another device. With one for all worlds, a recovery from a second
    failure, while groups were made, was seen to wait for its timeout: whatever the first attempt
    had left on the thread must not be in the way of the next one.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = self._Options()  # type: ignore[attr-defined]  # not in its stubs
        options._devices, options._timeout = [_device()], timeout
        super().__init__(store, rank, size, options)


def _on_another_device(host: Callable[..., Any]) -> Callable[..., Any]:
    """``host`` (``init_process_group``) for a world whose groups share a new device."""

    @functools.wraps(host)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _device.cache_clear()
        return host(*args, **kwargs)

    return wrapper


def install() -> None:
    """Wrap the two functions that create process groups, under every name they have, and have them
    make those of one world on one device.
    """
    distributed_c10d.ProcessGroupGloo = OneDevice  # type: ignore[misc]  # a name like any other
    for name in ("init_process_group", "new_group"):
        wrapper = _without_nccl(getattr(distributed_c10d, name))
        if name == "init_process_group":
            wrapper = _on_another_device(wrapper)
        setattr(distributed_c10d, name, wrapper)
        setattr(dist, name, wrapper)
