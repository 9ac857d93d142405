"""Typed keys of logged entries.

Their text form is `<kind>/<iteration>/<rest>`, which the vault orders by iteration. One definition
of iteration everywhere: `iteration` i is the iteration whose optimizer step is step i.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """Which way a boundary tensor crosses a stage edge."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class BoundaryKey:
    """An activation or gradient that crosses a stage edge, kept by its sender.

    `ordinal` counts the tensors that cross this edge in this direction in this iteration, from 0.
    Edges are first-in first-out, so it names (microbatch, model chunk) on both sides: it is the
    microbatch itself for plain 1F1B, and `chunk * microbatches + ...` in the schedule's own order
    when interleaved.
    """

    iteration: int
    direction: Direction
    ordinal: int

    def __str__(self) -> str:
        return f"boundary/{self.iteration}/{self.direction.value}/{self.ordinal}"


@dataclass(frozen=True)
class CollectiveKey:
    """The result of a collective on one rank; `group` is the group's position in creation order."""

    iteration: int
    group: str
    ordinal: int

    def __str__(self) -> str:
        return f"collective/{self.iteration}/{self.group}/{self.ordinal}"


@dataclass(frozen=True)
class BatchKey:
    """The `microbatch`-th batch that model chunk `chunk` drew in an iteration."""

    iteration: int
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"batch/{self.iteration}/{self.chunk}/{self.microbatch}"


@dataclass(frozen=True)
class HeaderKey:
    """State at an iteration's start beside parameters and optimizer: RNG, scheduler, counters."""

    iteration: int

    def __str__(self) -> str:
        return f"header/{self.iteration}/start"


@dataclass(frozen=True)
class ResultKey:
    """What the host's training step of an iteration returned, and what its logging will read."""

    iteration: int

    def __str__(self) -> str:
        return f"result/{self.iteration}/end"


@dataclass(frozen=True)
class FrameKey:
    """The frame captured after optimizer step `iteration`; 0 is that of the starting state."""

    iteration: int

    def __str__(self) -> str:
        return f"frame/{self.iteration}/state"


@dataclass(frozen=True)
class InterludeKey:
    """What a rank logs of the `number`-th interlude after an iteration: `note` is how things stood
    before it, `end` how they stand behind it.
    """

    iteration: int
    number: int
    what: str

    def __str__(self) -> str:
        return f"interlude/{self.iteration}/{self.number}/{self.what}"


Key = BoundaryKey | CollectiveKey | BatchKey | HeaderKey | ResultKey | FrameKey | InterludeKey


def iteration_of(key: str) -> int:
    """The iteration of a key in text form."""
    return int(key.split("/", 2)[1])
