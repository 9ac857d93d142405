"""What an agent sees of its workers from outside: pages, processes, answers to pings."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_moetion.agent.hangs import STOPPED, TRACED, Observation, usual_pause, usual_step
from megatron_moetion.agent.wire import Message
from megatron_moetion.progress import SET_UP, Page


@dataclass
class _Look:
    """One that waits for pings to be answered."""

    number: int
    deadline: float
    pinged: frozenset[int]
    awaited: set[int]


class Watch:
    """Watches the workers of one node.

    Args:
        global_ranks: of this node.
        pid_of: of a rank's worker; 0 while there is none.
        notify: sends a notice to a local worker.
        report: tells the leader.
    """

    def __init__(
        self,
        global_ranks: Sequence[int],
        pid_of: Callable[[int], int],
        notify: Callable[[int, Message], None],
        report: Callable[[Message], None],
    ) -> None:
        self._ranks, self._pid_of = tuple(global_ranks), pid_of
        self._notify, self._report = notify, report
        self._lock = threading.Lock()
        self._pages: dict[int, Page] = {}
        self._look: _Look | None = None

    def page_for(self, global_rank: int) -> str:
        """A new page for a worker that has connected; any thread may call it.

        Returns:
            Where the worker finds it.
        """
        page = Page()
        with self._lock:
            before = self._pages.pop(global_rank, None)
            self._pages[global_rank] = page
        if before is not None:
            before.close()
        return page.path

    def forget(self, global_rank: int) -> None:
        """The worker has ended."""
        with self._lock:
            page = self._pages.pop(global_rank, None)
        if page is not None:
            page.close()

    def seconds_left(self) -> float | None:
        """Until `tick` has something to do; None when nothing is awaited."""
        return None if self._look is None else max(0.0, self._look.deadline - time.monotonic())

    def look(self, number: int, ping_seconds: float) -> None:
        """Tell the leader what there is to be seen, after pings if it asks for them."""
        pinged = set()
        if ping_seconds:
            states = {rank: self._observe(rank).state for rank in self._ranks}
            # A stopped process answers nothing, and need not.
            pinged = {rank for rank, s in states.items() if s and s not in (STOPPED, TRACED)}
        deadline = time.monotonic() + ping_seconds
        self._look = _Look(number, deadline, frozenset(pinged), pinged)
        for rank in sorted(self._look.pinged):
            self._notify(rank, {"op": "ping", "number": number})
        self._conclude_if_due()

    def pong(self, global_rank: int, number: int) -> None:
        """A worker has answered a ping."""
        if self._look is not None and self._look.number == number:
            self._look.awaited.discard(global_rank)
            self._conclude_if_due()

    def tick(self) -> None:
        """Called when `seconds_left` is over."""
        if self._look is not None:
            self._conclude_if_due()

    def _conclude_if_due(self) -> None:
        look = self._look
        assert look is not None
        if look.awaited and time.monotonic() < look.deadline:
            return
        self._look = None
        seen = [self._observe(rank) for rank in self._ranks]
        answered = [
            replace(each, answers=each.global_rank not in look.awaited)
            if each.global_rank in look.pinged
            else each
            for each in seen
        ]
        told = [each.to_json() for each in answered]
        self._report({"op": "looked", "number": look.number, "seen": told})

    def _observe(self, rank: int) -> Observation:
        pid = self._pid_of(rank)
        state = state_of(pid) if pid else ""
        with self._lock:
            page = self._pages.get(rank)
            seen = None if page is None else page.read()
        if seen is None:
            return Observation(rank, pid, 0.0, 0, 0, SET_UP, False, state)
        seconds = max(0.0, (time.monotonic_ns() - seen.stamp_ns) / 1e9)
        where = (seen.iteration, seen.ordinal, seen.place, seen.waiting)
        step, pause = usual_step(seen.steps), usual_pause(seen.pauses)
        return Observation(rank, pid, seconds, *where, state, step=step, pause=pause)


def state_of(pid: int) -> str:
    """The letter of /proc/PID/stat; empty when there is no such process."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        # The name before it may hold blanks and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
