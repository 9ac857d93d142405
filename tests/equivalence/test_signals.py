"""A signal in the middle of a recovery ends real training workers, too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_moetion import events
from tests.stub_jobs import gone
from tests.stub_nodes import END_SECONDS
from tests.waiting import readable

from .harness import Runner, follow, kill_workers


@pytest.mark.parametrize("kind", ["detected", "quiesced", "gathered"])
def test_sigterm_in_a_recovery_leaves_nothing_within_ten_seconds(runner: Runner, kind: str) -> None:
    in_time: list[bool] = []

    def meddle(directory: Path) -> None:
        next(line for line in follow(directory / "log") if f" iteration {8:8d}/" in line)
        (agent,) = (directory / events.FOLDER).glob("agent-*")
        told = follow(agent, after=agent.stat().st_size)
        kill_workers(directory, (1, 3))
        next(line for line in told if f'"kind":"{kind}"' in line)
        told.close()
        launcher = int((directory / "launcher-0.pid").read_text())
        ends = os.pidfd_open(launcher)
        os.kill(launcher, signal.SIGTERM)
        in_time.append(readable(ends, END_SECONDS))
        os.close(ends)

    name = f"signalled-{kind}"
    run = runner.run(name, iterations=400, flags=["--moetion"], meddle=meddle, afresh=True)
    assert run.code == 128 + signal.SIGTERM, run.tail()
    assert in_time == [True]
    assert all(gone(event["pid"]) for event in run.events("started"))
    ending = [line for line in run.log.splitlines() if line.startswith("moetion-run: ending")]
    assert ending == ["moetion-run: ending the job: node 0 got signal 15"]
