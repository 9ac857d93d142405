"""The agents of a job of stub workers, and what is left when they have ended."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_moetion.events import read
from tests.ports import free_port
from tests.stub_jobs import LIMIT_SECONDS, Process, gone, launch, protected

LEASE = 3
"""Seconds; the cores may be taken by other tests for a part of that."""
END_SECONDS = 10
"""Within which every process of a job has ended after a signal."""
FOR_EVER = 10**9
TICK_SECONDS = 0.05


class Nodes:
    """The agents of one job; whoever is left at the end of a test is killed.

    Args:
        directory: of the run's events; beside it is the agents' folder for temporary files.
        script: arguments of the stub.
        pace: seconds of an iteration, at least.
        afresh: everything is started as for a user, not from the nursery.
        env: for the agents and their workers.
    """

    def __init__(
        self,
        directory: Path,
        *script: str,
        pace: str = "0.05",
        afresh: bool = False,
        **env: str,
    ) -> None:
        self.directory, self.temporary = directory / "run", directory / "tmp"
        self.temporary.mkdir()
        self.argv = ["--nnodes", "2", "--nproc-per-node", "1", "--master-port", str(free_port())]
        self.script = protected(self.directory, iterations=FOR_EVER)
        self.script += ["--pace", pace, "--moetion-lease", str(LEASE), *script]
        self.env, self.afresh = env, afresh
        self.all: list[Process] = []
        self.leader: Process | None = None

    def start(self, *words: str, label: str) -> Process:
        argv = [*self.argv, *words, "--failure-domain", label]
        env = {"MOETION_SECRET": "ab" * 16, "TMPDIR": str(self.temporary), **self.env}
        self.all.append(launch(argv, *self.script, afresh=self.afresh, **env))
        return self.all[-1]

    def members(self, *words: str) -> tuple[Process, Process]:
        """Nodes 0 and 1, once both train."""
        zero, one = (self.start(*words, "--node-rank", str(n), label=f"rack-{n}") for n in range(2))
        self.leader = zero
        self.until("welcome", 2)
        return zero, one

    def alone(self, num_workers: int, *words: str) -> Process:
        """A job on one node, once it trains."""
        self.argv = ["--nproc-per-node", str(num_workers)]
        self.leader = self.start(*words, label="rack-0")
        self.until("welcome", num_workers)
        return self.leader

    def standby(self, number: int = 1) -> Process:
        process = self.start("--standby", label="spare")
        self.until("parked", number)
        return process

    def until(self, kind: str, number: int, **fields: Any) -> list[dict[str, Any]]:
        """Wait for so many events of a kind, or for the end of the leader."""
        limit = time.monotonic() + LIMIT_SECONDS
        while True:
            found = [e for e in read(self.directory) if e["kind"] == kind]
            found = [e for e in found if fields.items() <= e.items()]
            if len(found) >= number:
                return found
            assert time.monotonic() < limit, f"no {kind} {fields}"
            assert self.leader is not None
            try:
                code = self.leader.wait(TICK_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(f"the leader ended with {code} and there was no {kind} {fields}")

    def events(self) -> list[dict[str, Any]]:
        """All that there are."""
        return read(self.directory)

    def worker(self, global_rank: int) -> int:
        return int(self.until("welcome", 1, who=f"rank-{global_rank}")[-1]["pid"])

    def workers(self) -> list[int]:
        return [e["pid"] for e in self.until("welcome", 1)]

    def assert_nothing_is_left(self) -> None:
        """No process, no socket in the abstract namespace, no file but the run's."""
        assert all(process.poll() is not None for process in self.all)
        # What they had started, too: none has a memfd or a socket any more.
        assert all(gone(pid) for pid in self.workers())
        started = {e["pid"] for e in self.until("started", 1)}
        assert all(gone(pid) for pid in started)
        run_id = self.until("began", 1)[0]["run_id"]
        assert f"moetion-{run_id}" not in Path("/proc/net/unix").read_text()
        assert list(self.temporary.iterdir()) == []
        assert {path.name for path in self.directory.iterdir()} <= {"events", "spill"}

    def close(self) -> None:
        for process in self.all:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            # Shown with a failure.
            print(*process.communicate())


def ended(process: Process, seconds: float = LIMIT_SECONDS) -> tuple[int, list[str]]:
    """Exit code, and the lines of the agent itself."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, [x for x in errors.splitlines() if x.startswith("moetion-run:")]
