"""How far a worker is, told outside the collectives: a page of shared memory that the worker writes
and the agent of its node reads.

Writing is a few stores, with no lock, no system call and no message, so it is done at every place
and around every wait for peers. The clock is the node's monotonic one, which both sides share.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_moetion import faults

PAGE_BYTES = 4096
SET_UP, EVALUATION, SAVING = "set-up", "evaluate", "save"
RECOVERY, REPLAY, BETWEEN = "recovery", "replay", "between iterations"
PLACES = (SET_UP, *faults.PLACES, BETWEEN, RECOVERY)
_CODES = {place: code for code, place in enumerate(PLACES)}

UNLIKE_OTHERS = 2
"""Iterations after a start or a recovery whose time says nothing of those that follow: kernels are
chosen, connections made, memory is taken.
"""
FEWEST = 3
"""Iterations after these from which on their time is taken for usual."""
KEPT = 64
"""Times of so many iterations are kept."""

KEPT_PAUSES = 8
"""Of so many evaluations, and of so many savings."""

_STAMP, _ITERATION, _PLACE, _MICROBATCH, _ORDINAL, _WAITS, _NUM_STEPS, _FIRST_STEP = range(8)
_PAUSES = {
    place: _FIRST_STEP + KEPT + number * (1 + KEPT_PAUSES)
    for number, place in enumerate((EVALUATION, SAVING))
}
"""Where it stands how many there were, and then the longest pause in each of the last ones."""
_NONE = -1


@dataclass(frozen=True)
class Seen:
    """What a page says.

    Attributes:
        stamp_ns: when its worker was last seen to do something.
        iteration: that it is in.
        ordinal: how many places of it the worker has been through.
        place: one of PLACES, with the microbatch where there is one.
        waiting: inside a wait for peers.
        steps: seconds that iterations like the next one have taken, in no order.
        pauses: in an evaluation or in saving, the longest time without progress in each of the
            last ones, in seconds and in no order; empty elsewhere.
    """

    stamp_ns: int
    iteration: int
    ordinal: int
    place: str
    waiting: bool
    steps: tuple[float, ...]
    pauses: tuple[float, ...] = ()


class Page:
    """The memory of one worker's page; made by the agent, one for each process."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("moetion-progress", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, PAGE_BYTES)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._fields = memoryview(mmap.mmap(self._fd, PAGE_BYTES)).cast("q")
        self._fields[_MICROBATCH], self._fields[_STAMP] = _NONE, time.monotonic_ns()

    def read(self) -> Seen:
        """What the worker wrote last; while it writes, some of it may be of the place before."""
        f = self._fields
        place, microbatch = PLACES[f[_PLACE]], f[_MICROBATCH]
        known = min(f[_NUM_STEPS], KEPT)
        ring = _PAUSES.get(place)
        pauses = () if ring is None else f[ring + 1 : ring + 1 + min(f[ring], KEPT_PAUSES)]
        return Seen(
            stamp_ns=f[_STAMP],
            iteration=f[_ITERATION],
            ordinal=f[_ORDINAL],
            place=place if microbatch == _NONE else f"{place}:{microbatch}",
            waiting=f[_WAITS] > 0,
            steps=tuple(ns / 1e9 for ns in f[_FIRST_STEP : _FIRST_STEP + known]),
            pauses=tuple(ns / 1e9 for ns in pauses),
        )

    def close(self) -> None:
        """Its worker has ended."""
        os.close(self._fd)


class Progress:
    """The writing side.

    Args:
        path: of the page; None writes for nobody.
    """

    def __init__(self, path: str | None = None) -> None:
        memory: mmap.mmap | bytearray = bytearray(PAGE_BYTES)
        if path is not None:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                memory = mmap.mmap(fd, PAGE_BYTES)
            finally:
                os.close(fd)
        self._fields = memoryview(memory).cast("q")
        self._fields[_MICROBATCH] = _NONE
        self._began: tuple[int, int] | None = None
        self._in_a_row = 0
        self._longest = self._num_recoveries = 0
        self._fields[_STAMP] = time.monotonic_ns()

    def at(self, place: str, iteration: int, microbatch: int | None = None) -> None:
        """The worker is at a place."""
        f = self._fields
        f[_PLACE], f[_ITERATION] = _CODES[place], iteration
        f[_MICROBATCH] = _NONE if microbatch is None else microbatch
        f[_ORDINAL] += 1
        self.moved()

    def moved(self) -> None:
        """The worker has done something at the place where it is."""
        now = time.monotonic_ns()
        pause = now - self._fields[_STAMP]
        if pause > self._longest:
            self._longest = pause
        self._fields[_STAMP] = now

    def waits(self, calls: int) -> None:
        """So many calls wait for peers now; a wait that begins or ends is progress."""
        self._fields[_WAITS] = calls
        self.moved()

    def begin(self, iteration: int) -> bool:
        """An iteration begins; whether with it enough of them have taken their usual time."""
        now, began = time.monotonic_ns(), self._began
        self._began = (iteration, now)
        self._fields[_ORDINAL] = 0
        if began is None or began[0] != iteration - 1:
            return False
        self._in_a_row += 1
        if self._in_a_row <= UNLIKE_OTHERS:
            return False
        number = self._fields[_NUM_STEPS]
        self._fields[_FIRST_STEP + number % KEPT] = now - began[1]
        self._fields[_NUM_STEPS] = number + 1
        return self._in_a_row == UNLIKE_OTHERS + FEWEST

    def recovers(self) -> None:
        """How long this iteration takes says nothing, nor do the next ones."""
        self._began, self._in_a_row = None, 0
        self._num_recoveries += 1

    @contextmanager
    def aside(self, place: str) -> Iterator[None]:
        """Something that is no part of an iteration, and how long that takes says nothing."""
        f = self._fields
        before = f[_PLACE], f[_MICROBATCH]
        self._began = None
        self.at(place, f[_ITERATION])
        self._longest, recoveries = 0, self._num_recoveries
        try:
            yield
            self.moved()
            if self._num_recoveries == recoveries and place in _PAUSES:
                ring = _PAUSES[place]
                f[ring + 1 + f[ring] % KEPT_PAUSES] = self._longest
                f[ring] += 1
        finally:
            f[_PLACE], f[_MICROBATCH] = before
            self.moved()
