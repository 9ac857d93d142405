"""Children are tied to their parent and end with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from statistics import median

import pytest

from megatron_moetion.agent import supervision
from megatron_moetion.agent.supervision import Child
from tests.waiting import readable

QUIET = [sys.executable, "-S", "-c"]
WAIT = "import signal; print('up', flush=True); signal.pause()"
STUBBORN = f"import signal; signal.signal(15, signal.SIG_IGN)\n{WAIT}\nsignal.pause()"


def start(code: str, write: int) -> Child:
    env = {**os.environ, "MARK": "yes"}
    command = [*QUIET, f"import os; os.dup2({write}, 1)\n{code}"]
    return supervision.start("child", command, env, [write])


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def wait_for_end(child: Child) -> None:
    assert readable(child.pidfd, 30)


def test_the_command_keeps_the_pid_and_gets_the_environment(pipe: tuple[int, int]) -> None:
    read, write = pipe
    child = start("os.write(1, f'{os.getpid()} {os.environ[\"MARK\"]}\\n'.encode())", write)
    assert os.read(read, 100).decode() == f"{child.pid} yes\n"
    wait_for_end(child)
    assert not child.alive
    assert supervision.reap(child) == 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [("os._exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("os.kill(os.getpid(), 15)", 143)],
)
def test_codes_are_those_of_a_shell(pipe: tuple[int, int], code: str, expected: int) -> None:
    child = start(code, pipe[1])
    wait_for_end(child)
    assert supervision.reap(child) == expected


def test_a_missing_command_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    child = supervision.start("child", ["/nonexistent"], os.environ)
    wait_for_end(child)
    assert supervision.reap(child) == 1
    assert "moetion-run: cannot start /nonexistent: No such file" in capfd.readouterr().err


def test_a_death_is_seen_within_milliseconds(pipe: tuple[int, int]) -> None:
    read, write = pipe
    taken = []
    for _ in range(5):
        child = start(WAIT, write)
        os.read(read, 10)
        killed = time.monotonic()
        os.kill(child.pid, signal.SIGKILL)
        wait_for_end(child)
        taken.append(time.monotonic() - killed)
        supervision.reap(child)
    # The cores may be taken by another test at one of these moments.
    assert median(taken) < 0.1, taken


def test_what_a_worker_left_behind_is_killed_when_it_is_reaped(pipe: tuple[int, int]) -> None:
    read, write = pipe
    grandchild = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
    )
    child = start(grandchild, write)
    pid = int(os.read(read, 100))
    wait_for_end(child)
    pidfd = os.pidfd_open(pid)
    supervision.reap(child)
    assert readable(pidfd, 30)
    os.close(pidfd)


def test_ending_asks_first_and_kills_after_the_grace(pipe: tuple[int, int]) -> None:
    read, write = pipe
    children = [start(WAIT, write), start(STUBBORN, write)]
    children[0].label, children[1].label = "polite", "stubborn"
    got = b""
    while got.count(b"up") < 2:
        got += os.read(read, 10)
    ended = supervision.end_all(children, grace=timedelta(seconds=0.5))
    assert ended.codes == {"polite": 143, "stubborn": 137}
    assert ended.killed == ["stubborn"]


PARENT = """
import os, signal, sys
from megatron_moetion.agent import supervision
pause = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
child = supervision.start("child", pause, os.environ)
print(child.pid, flush=True)
signal.pause()
"""


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], env=env, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pidfd = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert readable(pidfd, 30)
    os.close(pidfd)
