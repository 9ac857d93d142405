"""A whole node is lost: its agent, its workers, and all that was in its memory. Another one takes
its place and begins with the copies that the others hold.
"""

import os
import signal
from pathlib import Path

from megatron_moetion.agent.standby import LAPSED_CODE
from tests.waiting import readable

from .harness import Run, Runner, assert_same_bits, follow, kill_agent, kill_workers, node_pids

ITERATIONS = 44
WINDOW = 3
STALE = "stale.ended"


def _lose(directory: Path) -> None:
    """Node 1 is killed with its agent, a standby takes its place, and the agent comes back as one
    that stands by. Later the former standby is stopped, agent and workers alike, the one that came
    back takes its place, and then what was stopped goes on.
    """
    stopped: list[int] = []
    for line in follow(directory / "log"):
        if " iteration        6/" in line:
            kill_agent(directory, 1)
        # The new node's workers and the others are like any: in an iteration in which what they
        # had before is still needed, and in a later one.
        if " iteration       16/" in line:
            kill_workers(directory, [3])
        if " iteration       27/" in line and not stopped:
            stopped = node_pids(directory, 2, [2, 3])
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
        if " iteration       30/" in line:
            (directory / STALE).write_text(str(_wake(stopped)))
        if " iteration       34/" in line:
            kill_workers(directory, [0, 2])
            return


def _wake(pids: list[int]) -> bool:
    """Let stopped processes go on, workers first; whether all end by themselves."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    ended = [readable(pidfd, 60) for pidfd in pidfds]
    return all(ended)


def test_a_node_is_replaced_by_another_one(runner: Runner, off: Run) -> None:
    flags = ["--moetion", "--moetion-cut", "shard", "--moetion-window", str(WINDOW)]
    flags += ["--moetion-replicas", "1"]
    run = runner.run(
        "node-loss",
        iterations=ITERATIONS,
        workers_of_node=[2, 2],
        flags=flags,
        meddle=_lose,
        restarts=True,
        standbys=1,
    )
    codes = [int((run.directory / f"launcher-{node}.code").read_text()) for node in range(3)]
    assert codes == [0, 0, LAPSED_CODE], run.tail()
    assert [e["recovered"] for e in run.recoveries] == [[2, 3], [3], [2, 3], [0, 2]]
    assert [e["why"].split(",")[0] for e in run.events("node-lost")] == [
        "connection closed",
        "silent for 4 s",
    ]
    assert (run.directory / STALE).read_text() == "True"
    assert_same_bits(run, off, ITERATIONS, lines_may_repeat=True)
