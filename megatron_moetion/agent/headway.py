"""Whether the main loop of an agent makes headway, seen by a thread that does nothing else.

Beats come from threads of their own (`lease`). So an agent whose loop stands still, as in a write
to a terminal or a file system that takes no more, would count as there, and look after nobody.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

OF_TIMEOUT = 4
"""The limit is this part of --moetion-timeout: far more than the milliseconds of a turn, and less
than a phase of a recovery, which is then for the agents that are left.
"""
LOOKS = 8
"""In so many looks in a row, which together take the limit, the loop is at the same thing."""


@dataclass
class Looks:
    """What the thread has seen. It counts looks and not time: a process that is stopped, or a
    machine that is suspended, looks at nothing.
    """

    _turn: int | None = None
    _in_a_row: int = 0

    def stands(self, turn: int | None) -> bool:
        """One more look.

        Args:
            turn: which one the loop is at; None while it waits for something to do.

        Returns:
            Whether it has been the same one in `LOOKS` looks.
        """
        self._in_a_row = self._in_a_row + 1 if turn == self._turn else 1
        self._turn = turn
        return turn is not None and self._in_a_row >= LOOKS


class Headway:
    """Watches the thread that makes this.

    Args:
        limit: for one turn, but for a `LOOKS`th.
        stands: called once, in another thread, with where the loop stands still; it ends the
            process.
    """

    def __init__(self, limit: timedelta, stands: Callable[[str], None]) -> None:
        self._limit, self._stands = limit, stands
        self._loop = threading.get_ident()
        self._turns = 0
        self._turn: int | None = None
        self._stopped, self._given_up = threading.Event(), threading.Event()

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
            self._turn = None
            if self._given_up.is_set():
                # Too late: it waits here for the end of the process.
                self._stopped.wait()

    def _watch(self) -> None:
        looks, interval = Looks(), self._limit.total_seconds() / LOOKS
        while not self._stopped.wait(interval):
            if looks.stands(self._turn):
                self._given_up.set()
                self._stands(self._where())
                return

    def _where(self) -> str:
        frame = sys._current_frames().get(self._loop)
        if frame is None:
            return "its end"
        last = traceback.extract_stack(frame)[-1]
        return f"{last.name} ({last.filename}:{last.lineno})"


def say(line: str, patience: timedelta) -> None:
    """Print to standard error, which may be what the loop waits for.

    Args:
        patience: until it is given up.
    """
    # Past the lock of `sys.stderr`, which the loop may hold.
    written = [sys.stderr.fileno(), f"{line}\n".encode()]
    writing = threading.Thread(target=os.write, args=written, daemon=True)
    writing.start()
    writing.join(patience.total_seconds())
