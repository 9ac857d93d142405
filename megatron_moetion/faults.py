"""Scripted failures: `kill:global_rank=3,iteration=7,at=backward:1`, several joined by `;`.

Workers fire their own faults (`Injector`); damage of copies is up to the agents (`Scripted`).

A fault fires once in the life of a job. Before it fires it is reported (`on_fire`), so that a
replacement, which gets the same command line, does not fire it again.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

KINDS = ("kill", "raise", "exit", "exit0", "oom", "stop", "spin", "hold", "corrupt", "poison")
PLACES = (
    "start",
    "batch",
    "forward",
    "backward",
    "grad-sync",
    "norm",
    "commit",
    "optimizer",
    "param-gather",
    "capture",
    "end",
    "log",
    "evaluate",
    "save",
    "ended",
    "planning",
    "regroup",
    "restore",
    "replay",
    "resume",
)
COUNTED = ("batch", "forward", "backward", "evaluate", "save", "ended", "replay")
IN_RECOVERY = PLACES[PLACES.index("planning") :]
"""Places of a worker that recovers, survivor or replacement."""
DAMAGED_PLACES = ("capture", "transfer", "stored")
"""Where a frame is damaged: when it is sealed, on its way to a holder, once copies are there."""
_OF_FRAMES = {"corrupt": DAMAGED_PLACES, "poison": DAMAGED_PLACES[:1]}
"""What is done to frames, and where."""


class InjectedFault(RuntimeError):
    """The exception of a `raise` fault: to everything else an unknown error of this worker."""


@dataclass(frozen=True)
class Fault:
    """One scripted failure.

    Attributes:
        kind: `kill` (SIGKILL to itself), `raise` (an exception in the worker), `exit` (code 3 at
            once), `exit0` (code 0, as if the script were finished), `oom` (memory is asked for
            that no device has), `stop` (SIGSTOP to itself), `spin` (an endless loop in C that never
            gives the GIL away: `sum` over `itertools.repeat`), `hold` (it stays there until another
            rank fails, and goes on), `corrupt` (a bit of the frame of that iteration flips),
            `poison` (optimizer state in it is NaN before it is sealed).
        global_rank: who fails, or whose frame it is.
        iteration: in which iteration (1 is the first optimizer step). IN_RECOVERY it is the one
            that counts as done, but for `planning`, where that is not known yet.
        place: one of PLACES, for `corrupt` one of DAMAGED_PLACES, for `poison` its first.
        microbatch: the number, from 0: of the pass or batch on this rank (`forward`, `backward`,
            `batch`, `evaluate`), of the barrier in saving (`save`: 0 is before the first file, K is
            before barrier K), of the interlude after an iteration (`ended`), of the iteration that
            is replayed (`replay`).
        copy: for `transfer` and `stored`: of the frame; 0 is the owner's own.
    """

    kind: str
    global_rank: int
    iteration: int
    place: str
    microbatch: int | None = None
    copy: int | None = None


def _parse_one(text: str) -> Fault:
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise ValueError(f"fault '{text}': kind '{kind}' is none of {', '.join(KINDS)}")
    fields = dict(part.strip().partition("=")[::2] for part in rest.split(",") if part.strip())
    missing = [name for name in ("global_rank", "iteration", "at") if not fields.get(name)]
    known = {"global_rank", "iteration", "at", *(["copy"] if kind == "corrupt" else [])}
    unknown = sorted(set(fields) - known)
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise ValueError(
            f"fault '{text}' {what}; write e.g. kill:global_rank=3,iteration=7,at=backward:1"
        )
    place, _, count = fields["at"].partition(":")
    places = _OF_FRAMES.get(kind, PLACES)
    if place not in places:
        raise ValueError(f"fault '{text}': place '{place}' is none of {', '.join(places)}")
    if (place in COUNTED) != bool(count):
        raise ValueError(
            f"fault '{text}': {', '.join(COUNTED)} take a number, as in forward:0, and need it; no "
            "other place does"
        )
    if ("copy" in fields) != (place in DAMAGED_PLACES[1:]):
        raise ValueError(f"fault '{text}': only transfer and stored take copy=K, and need it")
    try:
        values = (fields["global_rank"], fields["iteration"], count or "0", fields.get("copy", "1"))
        numbers = [int(value) for value in values]
    except ValueError:
        raise ValueError(
            f"fault '{text}': ranks, iterations, microbatches and copies are integers"
        ) from None
    if numbers[3] < (place == "transfer"):
        raise ValueError(f"fault '{text}': copies on other nodes begin at 1, the owner's own is 0")
    if numbers[0] < 0 or numbers[1] < 1 or numbers[2] < 0:
        raise ValueError(f"fault '{text}': global_rank >= 0, iteration >= 1, microbatch >= 0")
    copy = numbers[3] if "copy" in fields else None
    return Fault(kind, numbers[0], numbers[1], place, numbers[2] if count else None, copy)


def parse(spec: str) -> tuple[Fault, ...]:
    """Parses a fault script.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    return tuple(_parse_one(part) for part in spec.split(";") if part.strip())


class Injector:
    """Fires the faults of this rank at their places.

    Args:
        already_fired: by index.
        on_fire: told of each fault that fires, and its index.
        hold: returns when another rank has failed.
    """

    def __init__(
        self,
        faults: Iterable[Fault],
        global_rank: int,
        already_fired: Iterable[int],
        on_fire: Callable[[int, Fault], None],
        hold: Callable[[], None] = lambda: None,
    ) -> None:
        fired = set(already_fired)
        self._hold = hold
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
            if here and fault.kind not in _OF_FRAMES:
                self._take(index)
                self._hold() if fault.kind == "hold" else _fire(fault)

    def corrupts(self, iteration: int) -> bool:
        """Whether the frame of this iteration is to be damaged; true once."""
        return self._due("corrupt", iteration)

    def poisons(self, iteration: int) -> bool:
        """Whether the frame of this iteration is to be sealed with NaN in it; true once."""
        return self._due("poison", iteration)

    def _due(self, kind: str, iteration: int) -> bool:
        wanted = (kind, "capture", iteration)
        due = [i for i, f in self._mine.items() if (f.kind, f.place, f.iteration) == wanted]
        for index in due:
            self._take(index)
        return bool(due)

    def _take(self, index: int) -> None:
        self._on_fire(index, self._mine.pop(index))


class Scripted:
    """The damage that an agent is to do to copies of frames. Any thread may ask.

    Args:
        faults: of the whole job.
        already_fired: by index.
        on_fire: told of each fault that fires, and its index.
    """

    def __init__(
        self,
        faults: Iterable[Fault],
        already_fired: Iterable[int],
        on_fire: Callable[[int, Fault], None],
    ) -> None:
        self._lock = threading.Lock()
        fired = set(already_fired)
        told = enumerate(faults)
        self._left = {f: i for i, f in told if f.copy is not None and i not in fired}
        self._on_fire = on_fire

    def strike(
        self, place: str, global_rank: int, iteration: int, copy: int, damage: Callable[[], None]
    ) -> None:
        """Do the damage if it is due to this copy at this place; at most once."""
        fault = Fault("corrupt", global_rank, iteration, place, None, copy)
        with self._lock:
            if fault not in self._left:
                return
            index = self._left.pop(fault)
        damage()
        self._on_fire(index, fault)


def _fire(fault: Fault) -> None:
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            # If somebody has it go on, it does.
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        case "spin":
            sum(itertools.repeat(0))
        case "oom":
            # Beyond what an address can name, so that the allocator is sure to raise its own error.
            torch = importlib.import_module("torch")
            torch.empty(1 << 60, dtype=torch.uint8, device="cuda")
        case "exit" | "exit0":
            sys.stdout.flush()
            os._exit(3 if fault.kind == "exit" else 0)
    raise InjectedFault(f"injected by --moetion-fault: {fault}")
