"""Child processes: tied to this one, watched by pidfd, ended with everything they started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
TETHER = str(Path(__file__).with_name("tether.py"))
# A scheduler kills 30 s after its own SIGTERM (Slurm's KillWait), so be done well before.
GRACE = timedelta(seconds=8)
# For what has detached itself; together less than the 10 s in which a job has to be gone.
ORPHANS_GRACE = timedelta(seconds=1)


@dataclass(eq=False)
class Child:
    """A started process. `label` says what it is to whoever started it."""

    label: str
    pid: int
    """Its process id, also the id of its process group."""
    pidfd: int
    reaped: bool = False

    @property
    def alive(self) -> bool:
        """False from the moment it ended, before it was reaped as well as after."""
        return not self.reaped and not _readable(self.pidfd)

    def kill(self, number: int) -> None:
        """Signal the process and whatever it started; no-op once it was reaped."""
        if not self.reaped:
            os.killpg(self.pid, number)


def adopt_orphans() -> None:
    """Make this process the parent of what its children leave behind, in place of init."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap_orphans(is_child: Callable[[int], bool]) -> None:
    """Collect adopted processes that have ended.

    Args:
        is_child: whether a pid is that of a `Child`, which `reap` collects.
    """
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or is_child(ended.si_pid):
            # A child that waits to be reaped may hide others until then.
            return
        os.waitpid(ended.si_pid, 0)


def start(
    label: str, command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> Child:
    """Start a command in a process group of its own.

    Call it from the main thread only: the kernel ends the child with the *thread* that started it.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", TETHER, str(os.getpid()), *command],
        env=dict(env),
        pass_fds=tuple(pass_fds),
        start_new_session=True,
    )
    # `reap` waits for it by its pid, as for one that was adopted; Popen need not wait any more.
    process.returncode = 0
    return Child(label, process.pid, os.pidfd_open(process.pid))


def shell_code(returncode: int) -> int:
    """128 + n for a process that signal n ended."""
    return 128 - returncode if returncode < 0 else returncode


def reap(child: Child) -> int:
    """Collect an ended child and kill what it left behind; returns its code as a shell would."""
    # Until it is waited for, its pid and hence its group id cannot belong to anybody else.
    os.killpg(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    child.reaped = True
    os.close(child.pidfd)
    return shell_code(os.waitstatus_to_exitcode(status))


def kill_now(children: Sequence[Child], grace: timedelta = GRACE) -> None:
    """SIGKILL everybody and what they started, and see them end, for at most `grace`.

    For a process that is about to end by itself; any thread may call it while another one reaps.
    """
    deadline = time.monotonic() + grace.total_seconds()
    for child in children:
        with contextlib.suppress(OSError):
            child.kill(signal.SIGKILL)
    for child in children:
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as selector:
            selector.register(child.pidfd, selectors.EVENT_READ)
            selector.select(max(0.0, deadline - time.monotonic()))
            os.waitpid(child.pid, os.WNOHANG)


@dataclass
class Ended:
    """What `end_all` did: codes by label, and who had to be killed."""

    codes: dict[str, int] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)


def end_all(children: Sequence[Child], grace: timedelta = GRACE) -> Ended:
    """SIGTERM everybody, wait for at most `grace`, SIGKILL the rest, reap all."""
    ended = Ended()
    for child in children:
        child.kill(signal.SIGTERM)
        # One that is stopped gets to it only when it goes on.
        child.kill(signal.SIGCONT)
    deadline = time.monotonic() + grace.total_seconds()
    waiting = list(children)
    with selectors.DefaultSelector() as selector:
        for child in waiting:
            selector.register(child.pidfd, selectors.EVENT_READ, child)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fd)
                waiting.remove(key.data)
    for child in waiting:
        child.kill(signal.SIGKILL)
        ended.killed.append(child.label)
    for child in children:
        ended.codes[child.label] = reap(child)
    return ended


def end_orphans(grace: timedelta = ORPHANS_GRACE) -> None:
    """End what is left of this process's children once all of its own are reaped: what workers had
    started in sessions of their own. SIGTERM, at most `grace`, SIGKILL.
    """
    deadline = time.monotonic() + grace.total_seconds()
    number = signal.SIGTERM
    while orphans := _children():
        for pid in orphans:
            os.kill(pid, number)
        for pid in orphans:
            pidfd = os.pidfd_open(pid)
            with selectors.DefaultSelector() as selector:
                selector.register(pidfd, selectors.EVENT_READ)
                left = deadline - time.monotonic() if number is signal.SIGTERM else None
                over = selector.select(None if left is None else max(0.0, left))
            os.close(pidfd)
            if over:
                os.waitpid(pid, 0)
        # Whoever ignored it, and whoever they leave behind in turn.
        number = signal.SIGKILL


def _children() -> list[int]:
    """Pids of this process's children that are not reaped, adopted ones too."""
    found: list[int] = []
    for children in Path("/proc/self/task").glob("*/children"):
        # A thread that has ended has left its children to another one, and is listed no more.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, children.read_text().split())
    return found


def _readable(fd: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(0))
