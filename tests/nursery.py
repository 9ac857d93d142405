"""Launchers by fork: what every run imports, torch and Megatron, is imported once for all of them.

The agents of a run and their spares are forked from this program in place of being started afresh,
and workers from the spare as ever. What is left out is what an interpreter does before and after a
program: the imports, and taking a large heap apart, half of what a short run costs. A run that asks
for it (`Runner.run` and `stub_jobs.launch`, `afresh`) has all of it, and so have workers that
torchrun starts, agents that replace themselves, and spares that replace one.

As a program: `python -u -m tests.nursery FD`; requests come by the socket FD.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

from megatron_moetion.agent import spare, spares, supervision, tether
from tests.waiting import readable

ROOT = Path(__file__).parents[1]
MAX_REQUEST = 1 << 17


class Launcher:
    """A launcher that was forked; like `subprocess.Popen`, as far as that is used here.

    Args:
        report: where its parent tells its pid and how it ended.
        written: the files that it writes to.
    """

    def __init__(
        self, command: Sequence[str], report: socket.socket, written: Sequence[IO[str]]
    ) -> None:
        self._command, self._report, self._written = command, report, written
        message, fds, *_ = socket.recv_fds(report, MAX_REQUEST, 1)
        assert message, "the nursery has ended; what it wrote says why"
        self.pid: int = json.loads(message)
        (self._pidfd,) = fds
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        if self.returncode is None:
            if timeout is not None and not readable(self._report.fileno(), timeout):
                raise subprocess.TimeoutExpired(self._command, timeout)
            self.returncode = json.loads(self._report.recv(MAX_REQUEST))
            self._report.close()
            os.close(self._pidfd)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, ...]:
        """Waits for its end; what it and its workers have written, file by file.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        self.wait(timeout)
        return tuple(Path(f"/proc/self/fd/{file.fileno()}").read_text() for file in self._written)

    def poll(self) -> int | None:
        """Its exit code, None as long as it goes on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The program, one for each test process.

    Args:
        env: of the program. Runs may differ in what is read after the imports only.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        # Unbuffered, as spares are.
        command = [sys.executable, "-u", "-m", "tests.nursery", str(theirs.fileno())]
        with theirs:
            self._program = subprocess.Popen(
                command, cwd=ROOT, env=dict(env),
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        out: IO[str],
        errors: IO[str],
    ) -> Launcher:
        """Starts a launcher.

        Args:
            command: `python ... -m MODULE ...`.
            out: for what the run writes.
            errors: for its standard error; may be the same.
        """
        report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"command": list(command), "env": dict(env)}).encode()
        with theirs, self._lock:
            files = [out.fileno(), errors.fileno(), theirs.fileno()]
            socket.send_fds(self._socket, [request], files)
        return Launcher(command, report, (out, errors))

    def close(self) -> None:
        """Ends the program; all runs are over."""
        self._socket.close()
        self._program.wait()


def main() -> None:
    """Imports, then serves until nobody can ask any more."""
    asked = socket.socket(fileno=int(sys.argv[1]))
    show, warnings.showwarning = warnings.showwarning, lambda *_, **__: None
    for name in spare.modules_to_import():
        spare.preimport(name)
    warnings.showwarning = show
    # Behind the others, which see to it that the host's patches are there when it is imported.
    importlib.import_module("megatron_moetion.agent.launcher")
    obstacle = spare.why_not_to_fork()
    if obstacle:
        sys.exit(f"the nursery cannot fork: {obstacle}")
    while True:
        request, fds, *_ = socket.recv_fds(asked, MAX_REQUEST, 3)
        _reap(0 if not request else os.WNOHANG)
        if not request:
            return
        if os.fork() == 0:
            _watch(*fds, **json.loads(request))
        for fd in fds:
            os.close(fd)


def _reap(options: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _watch(out: int, errors: int, report: int, command: list[str], env: dict[str, str]) -> NoReturn:
    """The parent of one launcher: tells its pid and how it ended."""
    pid = os.fork()
    if pid == 0:
        os.dup2(out, 1)
        os.dup2(errors, 2)
        _become_launcher(command, env)
    with socket.socket(fileno=report) as told:
        socket.send_fds(told, [json.dumps(pid).encode()], [os.pidfd_open(pid)])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # A test that has given up does not hear it.
        with contextlib.suppress(BrokenPipeError):
            told.send(json.dumps(code).encode())
    os._exit(0)


def _become_launcher(command: list[str], env: dict[str, str]) -> NoReturn:
    _inherit_only(env)
    _write_at_once(lines=True)
    module = command.index("-m") + 1
    sys.argv = command[module:]
    # An agent that replaces itself is started afresh by these.
    sys.orig_argv = command
    spares.start = _start_spare
    _run(lambda: runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True))


def _start_spare(
    label: str, command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> supervision.Child:
    """Stands in for `supervision.start` of a spare, as long as the agent has no other threads."""
    if len(os.listdir("/proc/self/task")) > 1:
        return supervision.start(label, command, env, pass_fds)
    agent = os.getpid()
    began, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        tether.tie(agent)
        os.setsid()
        _inherit_only(env, pass_fds)
        _write_at_once(lines=False)
        _run(lambda: runpy.run_path(spares.PROGRAM, run_name="__main__"))
    os.close(begin)
    # At its end, which is when the spare has its own process group.
    os.read(began, 1)
    os.close(began)
    return supervision.Child(label, pid, os.pidfd_open(pid))


def _inherit_only(env: Mapping[str, str], fds: Sequence[int] = ()) -> None:
    """What a process that is started with these would have."""
    kept = sorted([2, *fds])
    for low, high in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(low + 1, high)
    os.environ.clear()
    os.environ.update(env)
    # Where that is was looked up under another environment.
    tempfile.tempdir = None


def _write_at_once(*, lines: bool) -> None:
    """As without and with `-u`. A line in two pieces may have another process's between them."""
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=lines, write_through=not lines)


def _run(program: Callable[[], object]) -> NoReturn:
    """Runs a program and ends as an interpreter does, but for taking its heap apart."""
    code = 0
    try:
        program()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
