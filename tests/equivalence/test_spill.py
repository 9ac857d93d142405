"""Everything is killed, agents too; the same command goes on from the newest spill, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from megatron_moetion import events

from .harness import Run, Runner, follow

WINDOW = 3
SPILLS = ["--moetion", "--moetion-window", str(WINDOW), "--moetion-spill-interval", "2"]
"""A spill every 6 iterations."""
ITERATIONS = 22


def kill_everything(directory: Path) -> None:
    """SIGKILL the agents, which are the launchers, and all workers."""
    started = {e["pid"] for e in events.read(directory) if e["kind"] == "started"}
    agents = {int(p.name.split(".")[-2]) for p in (directory / events.FOLDER).glob("agent-*")}
    for pid in agents | started:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            # The kernel ends a worker with its agent.
            continue


def after_spill(iteration: int) -> object:
    """Kills everything once this spill is valid."""

    def meddle(directory: Path) -> None:
        for line in follow(directory / "log"):
            if line:
                break
        (agent,) = (directory / events.FOLDER).glob("agent-0.*")
        for line in follow(agent):
            if '"kind":"spilled"' in line and f'"iteration":{iteration},' in line:
                kill_everything(directory)
                return

    return meddle


def again(runner: Runner, first: Run, name: str, **options: object) -> Run:
    """The same command in the same directory; the records are those of both runs."""
    flags = [*SPILLS, "--moetion-dir", str(first.directory)]
    second = runner.run(name, iterations=ITERATIONS, flags=flags, **options)
    return Run(first.directory, second.code, second.log)


def test_a_cold_start_goes_on_bit_for_bit(runner: Runner, off: Run) -> None:
    first = runner.run("spill", iterations=ITERATIONS, flags=SPILLS, meddle=after_spill(12))
    assert first.code == -signal.SIGKILL, first.tail()
    second = again(runner, first, "spill-again")
    assert second.code == 0, second.tail()
    assert "starting from the spill of iteration 12 in" in second.log
    assert [line[0] for line in second.lines] == [str(i) for i in range(13, ITERATIONS + 1)]
