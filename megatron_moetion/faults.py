"""Scripted failures: `kill:global_rank=3,iteration=7,at=backward:1`, several joined by `;`.

A fault fires once in the life of a job. Before it fires it is reported (`on_fire`), so that a
replacement, which gets the same command line, does not fire it again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn

KINDS = ("kill", "raise", "exit", "corrupt")
PLACES = (
    "start",
    "forward",
    "backward",
    "grad-sync",
    "norm",
    "optimizer",
    "param-gather",
    "capture",
    "end",
)
_COUNTED = ("forward", "backward")


class InjectedFault(RuntimeError):
    """The exception of a `raise` fault: to everything else an unknown error of this worker."""


@dataclass(frozen=True)
class Fault:
    """One scripted failure.

    Attributes:
        kind: `kill` (SIGKILL to itself), `raise` (an exception in the worker), `exit` (code 3 at
            once), `corrupt` (a bit of the frame of that iteration flips after it was sealed).
        global_rank: who fails.
        iteration: in which iteration (1 is the first optimizer step).
        place: one of PLACES.
        microbatch: for `forward` and `backward`: the number of the pass on this rank, from 0.
    """

    kind: str
    global_rank: int
    iteration: int
    place: str
    microbatch: int | None = None


def _parse_one(text: str) -> Fault:
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise ValueError(f"fault '{text}': kind '{kind}' is none of {', '.join(KINDS)}")
    fields = dict(part.strip().partition("=")[::2] for part in rest.split(",") if part.strip())
    missing = [name for name in ("global_rank", "iteration", "at") if not fields.get(name)]
    unknown = sorted(set(fields) - {"global_rank", "iteration", "at"})
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise ValueError(
            f"fault '{text}' {what}; write e.g. kill:global_rank=3,iteration=7,at=backward:1"
        )
    place, _, count = fields["at"].partition(":")
    if place not in PLACES:
        raise ValueError(f"fault '{text}': place '{place}' is none of {', '.join(PLACES)}")
    if (place in _COUNTED) != bool(count):
        raise ValueError(
            f"fault '{text}': only forward:K and backward:K take a microbatch, and need one"
        )
    if kind == "corrupt" and place != "capture":
        raise ValueError(f"fault '{text}': what is corrupted is a frame, write at=capture")
    try:
        numbers = [int(x) for x in (fields["global_rank"], fields["iteration"], count or "0")]
    except ValueError:
        raise ValueError(
            f"fault '{text}': ranks, iterations and microbatches are integers"
        ) from None
    if numbers[0] < 0 or numbers[1] < 1 or numbers[2] < 0:
        raise ValueError(f"fault '{text}': global_rank >= 0, iteration >= 1, microbatch >= 0")
    return Fault(kind, numbers[0], numbers[1], place, numbers[2] if count else None)


def parse(spec: str) -> tuple[Fault, ...]:
    """Parses a fault script.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    return tuple(_parse_one(part) for part in spec.split(";") if part.strip())


class Injector:
    """Fires the faults of this rank at their places."""

    def __init__(
        self,
        faults: Iterable[Fault],
        global_rank: int,
        already_fired: Iterable[int],
        on_fire: Callable[[int, Fault], None],
    ) -> None:
        fired = set(already_fired)
        self._mine = {
            index: fault
            for index, fault in enumerate(faults)
            if fault.global_rank == global_rank and index not in fired
        }
        self._on_fire = on_fire

    def reach(self, place: str, iteration: int, microbatch: int | None = None) -> None:
        """Called where a fault may fire; does nothing unless one is due here."""
        for index, fault in tuple(self._mine.items()):
            here = (fault.place, fault.iteration, fault.microbatch) == (
                place,
                iteration,
                microbatch,
            )
            if here and fault.kind != "corrupt":
                self._take(index)
                _fire(fault)

    def corrupts(self, iteration: int) -> bool:
        """Whether the frame of this iteration is to be damaged; true once."""
        due = [i for i, f in self._mine.items() if (f.kind, f.iteration) == ("corrupt", iteration)]
        for index in due:
            self._take(index)
        return bool(due)

    def _take(self, index: int) -> None:
        self._on_fire(index, self._mine.pop(index))


def _fire(fault: Fault) -> NoReturn:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "exit":
        sys.stdout.flush()
        os._exit(3)
    raise InjectedFault(f"injected by --moetion-fault: {fault}")
