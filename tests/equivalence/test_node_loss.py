"""A whole node is lost: its agent, its workers, and all that was in its memory. Another one takes
its place and begins with the copies that the others hold.
"""

from pathlib import Path

import pytest

from .harness import CUTS, Run, Runner, assert_same_bits, follow, kill_agent, kill_workers

ITERATIONS = 44
WINDOW = 3
LOST = {6: 1, 27: 1}
"""{iteration whose log line is waited for: node that is lost then}."""


def _lose(directory: Path) -> None:
    lost = dict(LOST)
    for line in follow(directory / "log"):
        for iteration in [i for i in lost if f" iteration {i:8d}/" in line]:
            kill_agent(directory, lost.pop(iteration))
        # The new node's workers and the others are like any: in an iteration in which what they
        # had before is still needed, and in a later one.
        if " iteration       16/" in line:
            kill_workers(directory, [3])
        if " iteration       34/" in line:
            kill_workers(directory, [0, 2])
            return


@pytest.mark.parametrize("cut", CUTS)
def test_a_node_is_replaced_by_another_one(runner: Runner, off: Run, cut: str) -> None:
    flags = ["--moetion", "--moetion-cut", cut, "--moetion-window", str(WINDOW)]
    flags += ["--moetion-replicas", "1"]
    run = runner.run(
        f"node-loss-{cut}",
        iterations=ITERATIONS,
        workers_of_node=[2, 2],
        flags=flags,
        meddle=_lose,
        restarts=True,
    )
    assert run.code == 0, run.tail()
    assert [e["recovered"] for e in run.recoveries] == [[2, 3], [3], [2, 3], [0, 2]]
    assert_same_bits(run, off, ITERATIONS, lines_may_repeat=True)
