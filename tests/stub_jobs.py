"""Jobs of stub workers under moetion-run, in real processes."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_moetion.events import read
from tests.nursery import Launcher, Nursery
from tests.waiting import readable

COMMAND = (sys.executable, "-m", "megatron_moetion.agent")
STUB = str(Path(__file__).parent / "unit" / "agent" / "stub_worker.py")
Process = Launcher | subprocess.Popen[str]
LIMIT_SECONDS = 240


@dataclass(frozen=True)
class Outcome:
    """What a job left."""

    codes: list[int]
    errors: str
    events: list[dict[str, Any]]

    def of(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        return [
            event
            for event in self.events
            if event["kind"] == kind and fields.items() <= event.items()
        ]


@cache
def _nursery() -> Nursery:
    nursery = Nursery(_environment())
    atexit.register(nursery.close)
    return nursery


def _environment(**env: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "MOETION_PREIMPORT": "torch",
        **env,
    }


def launch(argv: list[str], *script: str, afresh: bool = False, **env: str) -> Process:
    """Starts an agent of a job of stub workers.

    Args:
        argv: of `moetion-run`.
        script: arguments of the stub.
        afresh: everything is started as for a user, not from the nursery.
    """
    if afresh:
        return launch_plain([*argv, STUB, *script], **env)
    out, errors = (os.fdopen(os.memfd_create(name), "w+") for name in ("out", "errors"))
    return _nursery().start([*COMMAND, *argv, STUB, *script], _environment(**env), out, errors)


def launch_plain(argv: list[str], **env: str) -> subprocess.Popen[str]:
    """Starts an agent as for a user.

    Args:
        argv: of `moetion-run`, with the program that it is to run.
    """
    return subprocess.Popen(
        [*COMMAND, *argv],
        env=_environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: Sequence[Process], directory: Path) -> Outcome:
    outputs = [process.communicate(timeout=LIMIT_SECONDS) for process in processes]
    codes = [process.returncode for process in processes]
    return Outcome(codes, "".join(errors for _, errors in outputs), read(directory))


def protected(directory: Path, *deaths: str, iterations: int = 10) -> list[str]:
    script = ["--moetion", "--moetion-dir", str(directory), "--iterations", str(iterations)]
    return script + [word for death in deaths for word in ("--die", death)]


def assert_trained_to_the_end(outcome: Outcome, world_size: int, iterations: int = 10) -> None:
    assert outcome.codes == [0] * len(outcome.codes), outcome.errors
    finished = outcome.of("finished", iteration=iterations)
    assert sorted(event["who"] for event in finished) == [f"rank-{r}" for r in range(world_size)]


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process that is not ours has ended, or does so in a moment."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return readable(pidfd, seconds)
    finally:
        os.close(pidfd)
