"""Warm spares: processes that have imported everything and wait to become a worker."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moetion.agent.spare import NICENESS, SPARE_FD, SPARE_NICENESS
from megatron_moetion.agent.supervision import Child, start

PROGRAM = str(Path(__file__).with_name("spare.py"))


@dataclass(eq=False)
class Spare:
    """A spare process and the socket through which it is told what to become."""

    child: Child
    socket: socket.socket
    ready: bool = False

    def poll_ready(self) -> bool:
        """Whether it has reported that everything is imported."""
        if not self.ready:
            try:
                self.ready = bool(self.socket.recv(4096, socket.MSG_DONTWAIT))
            except (BlockingIOError, ConnectionResetError):
                return False
        return self.ready

    def assign(self, module: bool, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Make it the worker; it starts at once, or as soon as its imports are done.

        Raises:
            OSError: it has died.
        """
        if not self.poll_ready():
            # Nothing trains while a failure is handled, so its imports need not give way any more.
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, self.child.pid, 0)
        line = json.dumps({"module": module, "argv": list(argv), "env": dict(env)}) + "\n"
        self.socket.sendall(line.encode())
        self.socket.close()


class SparePool:
    """Keeps a number of spares.

    Args:
        size: how many to keep; 0 means that every replacement is a cold start.
        interpreter: the command that starts Python, options included.
        env: environment of a spare; the assignment adds to it.
    """

    def __init__(self, size: int, interpreter: Sequence[str], env: Mapping[str, str]) -> None:
        self._size = size
        self._command = [*interpreter, PROGRAM]
        self._env = env
        self._spares: list[Spare] = []
        self._count = 0

    def fill(self, during_training: bool) -> list[Child]:
        """Start what is missing.

        Args:
            during_training: whether the imports should give way to running workers.

        Returns:
            The new children, for the caller to watch.
        """
        niceness = str(NICENESS if during_training else 0)
        added = []
        while len(self._spares) < self._size:
            ours, theirs = socket.socketpair()
            with theirs:
                env = {
                    **self._env,
                    SPARE_FD: str(theirs.fileno()),
                    SPARE_NICENESS: niceness,
                }
                child = start(f"spare {self._count}", self._command, env, [theirs.fileno()])
            self._count += 1
            self._spares.append(Spare(child, ours))
            added.append(child)
        return added

    def take(self) -> Spare | None:
        """A spare that lives, one that is ready if there is one.

        One that still imports is taken as well: it is never behind a cold start.
        """
        alive = [spare for spare in self._spares if spare.child.alive]
        alive.sort(key=lambda spare: not spare.poll_ready())
        if not alive:
            return None
        self._spares.remove(alive[0])
        return alive[0]

    def lost(self, child: Child) -> bool:
        """A child ended; forget it if it was a spare. Returns whether it was."""
        for spare in self._spares:
            if spare.child is child:
                spare.socket.close()
                self._spares.remove(spare)
                return True
        return False
