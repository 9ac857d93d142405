"""What workers raised before they left: which of it a failure began with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """An exception that a worker left with.

    Attributes:
        lines: of its traceback.
        echo: it is what a lost peer looks like.
    """

    global_rank: int
    lines: tuple[str, ...]
    echo: bool

    @property
    def last(self) -> str:
        """The exception itself."""
        return next((line for line in reversed(self.lines) if line.strip()), "")


class Traces:
    """Keeps of each iteration what was raised first; an echo only until there is something else.

    An exception that comes again is shown as it was raised first, and what its peers then raised
    does not stand in its place.
    """

    def __init__(self) -> None:
        self._raised: dict[int, Trace] = {}
        self._first: dict[int | None, Trace] = {}
        self._newest: Trace | None = None

    def raised(self, global_rank: int, lines: Sequence[str], echo: bool) -> None:
        """A worker is about to leave with an exception."""
        trace = Trace(global_rank, tuple(lines), echo)
        self._raised[global_rank] = trace
        self._newest = _first(self._newest, trace)

    def left(self, global_rank: int, iteration: int | None) -> None:
        """A worker has ended; it was in that iteration."""
        trace = self._raised.pop(global_rank, None)
        if trace is not None:
            self._first[iteration] = _first(self._first.get(iteration), trace)

    def goes_on(self) -> None:
        """Training goes on."""
        self._newest = None

    def of(self, iteration: int | None) -> Trace | None:
        """What the failures in an iteration began with."""
        return self._first.get(iteration, self._newest)

    @property
    def newest(self) -> Trace | None:
        """What was raised first since training went on."""
        return self._newest


def _first(before: Trace | None, now: Trace) -> Trace:
    return now if before is None or (before.echo and not now.echo) else before
