"""The warm spare of a node: a process that has imported everything and forks workers on demand."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moetion.agent.spare import MAX_MESSAGE, SPARE_FD
from megatron_moetion.agent.supervision import Child, start

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
    """What came of assignments: workers by name, and names of those to be started cold; `over` when
    the process will say no more.
    """

    born: dict[int, Child] = field(default_factory=dict)
    cold: list[int] = field(default_factory=list)
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
        if obstacle:
            print(f"moetion-run: workers start cold, no fork: {obstacle}", file=sys.stderr)
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
