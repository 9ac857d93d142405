"""Stands in for streams, events and profiler ranges.

The CPU runs everything in program order on the calling thread, so whatever was recorded has
happened by the time the call returns: waiting is a no-op and every query says "done".
"""

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from megatron_moetion.rehearsal.answers import always


class Event:
    """A point in program order; ``elapsed_time`` is wall-clock milliseconds."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        """Note the time; everything issued before has already run."""
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Always true."""
        return True

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, end_event: "Event") -> float:
        """Milliseconds between the two records."""
        return (end_event._seconds - self._seconds) * 1000.0


class Stream:
    """The one order in which the CPU runs."""

    cuda_stream = 0
    stream_id = 0
    priority = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority, as CUDA reports them on most devices."""
        return (0, -1)

    def wait_event(self, event: object) -> None:
        """Return at once."""

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record ``event`` or a new one."""
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        """Always true."""
        return True

    def synchronize(self) -> None:
        """Return at once."""

    def is_capturing(self) -> bool:
        """Always false: there are no graphs here."""
        return False

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


_ONLY = Stream()


class StreamContext(contextlib.ContextDecorator):
    """``torch.cuda.stream(s)``: there is nothing to switch."""

    def __init__(self, stream: object) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


@contextlib.contextmanager
def _range(message: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def install() -> None:
    """Replace the stream and event classes and everything that hands them out."""
    cuda: Any = torch.cuda
    stand_ins = {
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "current_stream": always(_ONLY),
        "default_stream": always(_ONLY),
        "set_stream": always(None),
        "is_current_stream_capturing": always(False),
    }
    for name, stand_in in stand_ins.items():
        setattr(cuda, name, stand_in)
    accelerator: Any = torch.accelerator
    accelerator.current_stream = always(_ONLY)
    for module, names in ((cuda.nvtx, "range_push range_pop mark"), (cuda.profiler, "start stop")):
        for name in names.split():
            setattr(module, name, always(None))
    cuda.nvtx.range = _range
    # It asks the accelerator whether a graph is being captured; none ever is.
    optimizer: Any = torch.optim.Optimizer
    optimizer._accelerator_graph_capture_health_check = always(None)
