"""Waits for peers that another thread can call off.

Gloo (torch 2.13) forgets a transfer that was under way when its connection ended: whoever waits for
it is woken by nothing but the group's timeout. So native code waits in a thread of its own, which
can be left alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from megatron_moetion.recovery.failure import Interrupted

# Parts of it carry no types.
_cuda: Any = torch.cuda

ASIDE = "moetion-aside"
"""Name of threads that nobody waits for."""
_WORKERS = "pt_gloo_runloop"
"""Name of the threads that run gloo's collectives, cut by the kernel to 15 characters."""


class Wait(Enum):
    """What is waited for: groups being made, a collective that crosses stages, any other."""

    MAKING = "groups are made"
    CROSSING = "a collective crosses stages"
    INSIDE = "peers work together"


class _Call:
    """One native call and what came of it; `ended` once nothing of it runs any more."""

    def __init__(self, kind: Wait, call: Callable[[], Any]) -> None:
        self.kind, self.call, self.ended = kind, call, False
        self.outcome: SimpleQueue[tuple[Any, Exception | None] | None] = SimpleQueue()

    def run(self) -> None:
        outcome: tuple[Any, Exception | None]
        try:
            outcome = self.call(), None
        except Exception as error:
            outcome = None, error
        self.ended = True
        self.outcome.put(outcome)
        # An error and this frame, which is in its traceback, would keep each other, and groups.
        del outcome, self


class _Stand:
    """A thread that waits in place of others, one call at a time."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()
        threading.Thread(target=self._run, name="moetion-wait", daemon=True).start()

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            call.run()
            # What it holds must not live on until the next one.
            del call


class Waits:
    """Runs native calls that wait for peers; any thread may call them off.

    Groups carry the epoch that they were made in. What is called off under an epoch are waits on
    groups of earlier ones.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch = 0
        self._off = dict.fromkeys(Wait, 0)
        self._idle: list[_Stand] = []
        self._present: set[_Call] = set()
        self._alone: list[_Call] = []
        self._local = threading.local()
        self.on_change: Callable[[int], None] = lambda calls: None
        """Told how many calls there are under way, whenever one begins or ends."""

    @contextmanager
    def of(self, kind: Wait) -> Iterator[None]:
        """What this thread waits for inside is of this kind."""
        before, self._local.kind = self._kind(), kind
        try:
            yield
        finally:
            self._local.kind = before

    def run[T](self, function: Callable[[], T]) -> T:
        """Runs a function in another thread and waits for it.

        Raises:
            Interrupted: it was called off, before or meanwhile. The other thread may stay in it for
                ever, or go on for a moment: what it writes to must not be used before `settle`.
        """
        call = _Call(self._kind(), _on_this_device(function))
        with self._lock:
            if self._is_off(call):
                raise Interrupted(f"a peer was lost while {call.kind.value}")
            stand = self._idle.pop() if self._idle else _Stand()
            self._present.add(call)
            self.on_change(len(self._present))
        stand.calls.put(call)
        outcome = call.outcome.get()
        with self._lock:
            self._present.remove(call)
            self.on_change(len(self._present))
            if outcome is None:
                self._alone.append(call)
                stand.calls.put(None)
            else:
                self._idle.append(stand)
        if outcome is None:
            raise Interrupted(f"a peer was lost while {call.kind.value}")
        value, error = outcome
        try:
            if error is not None:
                raise error
            result: T = value
            return result
        finally:
            # As in `_Call.run`.
            del outcome, error

    def aside(self, function: Callable[[], object]) -> None:
        """Runs a function that may never return in a thread of its own, left alone at once."""
        call = _Call(self._kind(), function)
        # What has ended may hold errors, and those what was given up.
        self.num_alone()
        with self._lock:
            self._alone.append(call)
        threading.Thread(target=call.run, name=ASIDE, daemon=True).start()

    def call_off(self, epoch: int, *kinds: Wait) -> None:
        """Ends waits of these kinds on groups of earlier epochs, those under way and all later."""
        with self._lock:
            for kind in kinds:
                self._off[kind] = max(self._off[kind], epoch)
            for call in filter(self._is_off, self._present):
                call.outcome.put(None)

    def renew(self, epoch: int) -> None:
        """From now on waits are on groups of this epoch."""
        with self._lock:
            self._epoch = epoch

    def only_intact(self) -> None:
        """Passes as long as no failure was told that is newer than the groups in use.

        Raises:
            Interrupted: one was, and groups may have been aborted. On a GPU a collective ends
                without an error then, whatever is in its outputs.
        """
        with self._lock:
            if self._off[Wait.MAKING] > self._epoch:
                raise Interrupted("a peer was lost before a result was taken")

    def all_ended(self) -> bool:
        """Whether every call that was left alone has ended since."""
        return not self.num_alone()

    def num_alone(self) -> int:
        """Calls that were left alone and have not ended."""
        with self._lock:
            self._alone = [call for call in self._alone if not call.ended]
            return len(self._alone)

    def settle(self) -> None:
        """Returns once no collective writes to its outputs any more.

        To be called when the connections of aborted groups are cut. Then a collective that nobody
        waits for, as it was left alone or dropped, has ended, or it sleeps until it raises.
        """
        while any(name == _WORKERS and state in "RD" for name, state in _threads()):
            os.sched_yield()

    def _is_off(self, call: _Call) -> bool:
        return self._off[call.kind] > self._epoch

    def _kind(self) -> Wait:
        kind: Wait = getattr(self._local, "kind", Wait.INSIDE)
        return kind


def _threads() -> Iterator[tuple[str, str]]:
    """Name and state of each thread of this process."""
    for tid in os.listdir("/proc/self/task"):
        # It may have ended since.
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = Path(f"/proc/self/task/{tid}/stat").read_text()
            name, _, rest = stat.partition("(")[2].rpartition(")")
            yield name, rest.split()[0]


def _on_this_device[T](call: Callable[[], T]) -> Callable[[], T]:
    """The current CUDA device is a thread's own."""
    if not _cuda.is_initialized():
        return call
    device = _cuda.current_device()

    def there() -> T:
        _cuda.set_device(device)
        return call()

    return there
