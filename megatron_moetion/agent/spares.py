"""The warm spare of a node: a process that has imported everything and forks workers on demand."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moetion.agent.spare import MAX_MESSAGE, SPARE_FD
from megatron_moetion.agent.supervision import Child, start

WARM, BOOTING, COLD = "warm", "booting", "cold"
"""How a worker is started: by a spare that is ready, by one that still imports, by none."""
PROGRAM = str(Path(__file__).with_name("spare.py"))


@dataclass(frozen=True)
class Assignment:
    """A worker to start.

    Attributes:
        who: its name among the assignments under way.
        module: `argv[0]` is a module's name, not a path.
        argv: the script and its arguments.
        env: what is added to the spare's own environment.
    """

    who: int
    module: bool
    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass
class Heard:
    """What came of assignments: workers by name, and names of those to be started cold.

    Attributes:
        ready: the imports are done since just now.
        over: the process will say no more.
    """

    born: dict[int, Child] = field(default_factory=dict)
    cold: list[int] = field(default_factory=list)
    ready: bool = False
    over: bool = False


class Spare:
    """One spare process and the socket to it.

    Where forking would break a worker (see `spare.why_not_to_fork`) the process becomes the first
    worker itself, and this spare is used up: `spent`.

    Args:
        interpreter: the command that starts Python, options included.
        env: environment of the spare and of all its workers.
    """

    def __init__(self, interpreter: Sequence[str], env: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            env = {**env, SPARE_FD: str(theirs.fileno())}
            self.child = start("spare", [*interpreter, PROGRAM], env, [theirs.fileno()])
        self.ready = False
        self.spent = False
        self.obstacle = ""
        self._under_way: dict[int, Assignment] = {}

    @property
    def under_way(self) -> list[int]:
        """Names of the assignments that nothing has come of yet."""
        return list(self._under_way)

    def assign(self, assignment: Assignment) -> bool:
        """Have a worker started, now or as soon as the imports are done; `hear` tells of it.

        Returns:
            False when this spare cannot: it has ended or is used up.
        """
        if self.spent or not self.child.alive:
            return False
        self._under_way[assignment.who] = assignment
        if self.ready:
            self._send(assignment)
        return True

    def hear(self) -> Heard:
        """Read what the process says, without waiting; call it when the socket is readable."""
        heard = Heard()
        while message := self._receive():
            said = json.loads(message)
            if "born" in said:
                heard.born[said["born"]] = self._born(said["born"], said["pid"])
            else:
                heard.cold += self._imported(said["obstacle"])
                heard.ready = True
        heard.over = message == b""
        return heard

    def close(self) -> list[int]:
        """The process has ended or is a worker now; returns who was not started."""
        self.spent = True
        self.socket.close()
        left = list(self._under_way)
        self._under_way.clear()
        return left

    def _receive(self) -> bytes | None:
        """A message; empty when there will be no more, None when there is none now."""
        try:
            return self.socket.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""

    def _imported(self, obstacle: str) -> list[int]:
        self.ready, self.obstacle = True, obstacle
        cold = []
        for assignment in list(self._under_way.values()):
            if self.spent:
                del self._under_way[assignment.who]
                cold.append(assignment.who)
            else:
                self._send(assignment)
        return cold

    def _send(self, assignment: Assignment) -> None:
        self.spent = bool(self.obstacle)
        said = {"who": assignment.who, "module": assignment.module, "argv": assignment.argv}
        message = json.dumps({**said, "env": dict(assignment.env)}).encode()
        # A process that has just ended is noticed by its end, and `close` tells what is left.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.send(message)

    def _born(self, who: int, pid: int) -> Child:
        del self._under_way[who]
        if pid == self.child.pid:
            return self.child
        return Child(f"rank {who}", pid, os.pidfd_open(pid))


class Spares:
    """The warm spares of a node: one where it forks workers, else as many as are wanted, as each of
    them becomes one worker.

    Args:
        wanted: how many are kept where they cannot fork; 0 keeps none at all.
        make: starts one.
        on_new: told of each one, to listen to it and to watch its process.
        on_gone: told of one whose socket is about to be closed.
    """

    def __init__(
        self,
        wanted: int,
        make: Callable[[], Spare],
        on_new: Callable[[Spare], None],
        on_gone: Callable[[Spare], None],
    ) -> None:
        self._wanted, self._make = wanted, make
        self._on_new, self._on_gone = on_new, on_gone
        self._all: list[Spare] = []
        self._fork = True

    @property
    def all(self) -> list[Spare]:
        """Those that may still start workers."""
        return list(self._all)

    def keep(self) -> None:
        """Start as many as are missing."""
        while len(self._all) < (min(self._wanted, 1) if self._fork else self._wanted):
            self._all.append(self._make())
            self._on_new(self._all[-1])

    def assign(self, assignment: Assignment) -> str:
        """Have a worker started; returns how: WARM, BOOTING, or COLD when nobody here can."""
        for spare in sorted(self._all, key=lambda spare: not spare.ready):
            # Behind another worker it would not be started by one that cannot fork.
            if (self._fork or not spare.under_way) and spare.assign(assignment):
                return WARM if spare.ready else BOOTING
        return COLD

    def hear(self, spare: Spare) -> Heard:
        """`Spare.hear`; one that is used up is let go of."""
        if spare not in self._all:
            # Of two events at once, the other one has said so.
            return Heard()
        heard = spare.hear()
        if spare.obstacle and self._fork:
            self._fork = False
            print(
                f"moetion-run: {spare.obstacle}, so no worker is forked: a warm spare becomes one"
                f" worker, and this node keeps {self._wanted} (--spares)",
                file=sys.stderr,
            )
        if heard.over or spare.child in heard.born.values():
            heard.cold += self.let_go(spare)
        return heard

    def let_go(self, spare: Spare) -> list[int]:
        """It is a worker now or has ended; returns whom it has not started."""
        self._all.remove(spare)
        self._on_gone(spare)
        return spare.close()

    def of(self, child: Child) -> Spare | None:
        """The one whose process that is."""
        return next((spare for spare in self._all if spare.child is child), None)

    def starting(self, who: int) -> Spare | None:
        """The one that is to start that worker and has not yet."""
        return next((spare for spare in self._all if who in spare.under_way), None)
