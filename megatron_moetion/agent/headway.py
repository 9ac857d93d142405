"""Whether the main loop of an agent makes headway, seen by a thread that does nothing else.

Beats come from threads of their own (`lease`). So an agent whose loop stands still, as in a write
to a terminal or a file system that takes no more, would count as there, and look after nobody.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

OF_TIMEOUT = 4
"""The limit is this part of --moetion-timeout, but for node 0, whose end is that of the job: all of
it. A turn takes milliseconds, and a phase of a recovery, which may take --moetion-timeout, is then
for the agents that are left.
"""
FEWEST_LEASES = 2
"""No limit is shorter: a turn may have to wait for a peer that is silent for a lease."""
LOOKS = 8
"""After the first look at a thing, in so many more the loop is still at it; they take the limit."""


def limit(timeout: timedelta, lease: timedelta, node_rank: int) -> timedelta:
    """How long the main loop of an agent may be at one thing.

    Args:
        timeout: of --moetion-timeout.
        lease: of --moetion-lease.
    """
    return max(timeout / (OF_TIMEOUT if node_rank else 1), FEWEST_LEASES * lease)


@dataclass
class Looks:
    """What the thread has seen. It counts looks and not time: a process that is stopped, or a
    machine that is suspended, looks at nothing.
    """

    _turn: int | None = None
    _again: int = 0

    def stands(self, turn: int | None) -> bool:
        """One more look.

        Args:
            turn: which one the loop is at; None while it waits for something to do.

        Returns:
            Whether it has been the same one in `LOOKS` more looks than one.
        """
        self._again = self._again + 1 if turn == self._turn else 0
        self._turn = turn
        return turn is not None and self._again >= LOOKS


class Headway:
    """Watches the thread that makes this.

    Args:
        limit: for one turn.
        stands: called once, in another thread, with where the loop stands still; it ends the
            process.
    """

    def __init__(self, limit: timedelta, stands: Callable[[str], None]) -> None:
        self.limit, self._stands = limit, stands
        self._loop = threading.get_ident()
        self._lock = threading.Lock()
        self._turns = 0
        self._turn: int | None = None
        self._given_up = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """Watch from now on."""
        threading.Thread(target=self._watch, name="moetion-headway", daemon=True).start()

    def stop(self) -> None:
        """Nothing has to be looked after any more."""
        self._stopped.set()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Something is handled; for the watched thread, not nested."""
        self._turns += 1
        self._turn = self._turns
        try:
            yield
        finally:
            with self._lock:
                self._turn = None
                too_late = self._given_up
            if too_late:
                # It waits here for the end of the process.
                self._stopped.wait()

    def _watch(self) -> None:
        looks, interval = Looks(), self.limit.total_seconds() / LOOKS
        while not self._stopped.wait(interval):
            with self._lock:
                self._given_up = looks.stands(self._turn)
            if self._given_up:
                self._stands(self._where())
                return

    def _where(self) -> str:
        """Without a look at the sources: they may be what the loop waits for."""
        frame = sys._current_frames().get(self._loop)
        if frame is None:
            return "its end"
        code = frame.f_code
        return f"{code.co_name} ({code.co_filename}:{frame.f_lineno})"


def attempt(what: Callable[[], object], patience: timedelta) -> None:
    """Call something that may never return, as a write does to a terminal that is paused.

    Args:
        patience: until it is left alone.
    """
    calling = threading.Thread(target=what, daemon=True)
    calling.start()
    calling.join(patience.total_seconds())


def say(line: str, patience: timedelta) -> None:
    """`attempt` to print to standard error."""
    # Past the lock of `sys.stderr`, which somebody may hold who never comes back.
    file, written = sys.stderr.fileno(), f"{line}\n".encode()
    attempt(lambda: os.write(file, written), patience)
