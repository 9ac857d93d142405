"""A whole node is lost: its agent, its workers, and all that was in its memory. Another one takes
its place and begins with the copies that the others hold.
"""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_moetion import events
from tests.waiting import readable

from . import test_variants
from .harness import (
    CUTS,
    Run,
    Runner,
    assert_same_bits,
    follow,
    kill_agent,
    kill_workers,
    node_pids,
)

ORDERED = Path(__file__).with_name("ordered_pretrain.py")
ITERATIONS = 44
WINDOW = 3
STALE = "stale.ended"
CHANGED = 34
"""From this iteration on rank 2 has its experts in another order, and rank 3 has not."""
UNLIKE = CHANGED + 2
"""From the newest base that is old enough for the new node's neighbours, rank 2 needs one frame
more than rank 3 by then.
"""


def _lose(directory: Path) -> None:
    """Node 1 is killed with its agent, a standby takes its place, and the agent comes back as one
    that stands by. Later the former standby is stopped, agent and workers alike, the one that came
    back takes its place, and then what was stopped goes on.
    """
    stopped, seen = list[int](), set[str]()
    for line in follow(directory / "log"):
        # Who writes it may be killed before that is known, and then it is written again.
        found = re.match(r".* (iteration +\d+/)", line)
        if found is None or found[1] in seen:
            continue
        seen.add(found[1])
        if " iteration        6/" in line:
            kill_agent(directory, 1)
        # The new node's workers and the others are like any: in an iteration in which what they
        # had before is still needed, and in a later one.
        if " iteration       16/" in line:
            kill_workers(directory, [3])
        if " iteration       27/" in line:
            stopped = node_pids(directory, 2, [2, 3])
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
        if " iteration       30/" in line:
            (directory / STALE).write_text(str(_wake(stopped)))
        if f" iteration {UNLIKE - 1:8d}/" in line:
            _until(directory, 0, "fault")
            kill_workers(directory, [0, 2])
        if f" iteration {UNLIKE:8d}/" in line:
            _until(directory, 0, "fault")
            (leader,) = (directory / events.FOLDER).glob("agent-0.*")
            told = follow(leader, after=leader.stat().st_size)
            kill_agent(directory, 1)
            next(line for line in told if '"kind":"gathered"' in line)
            told.close()
            # It has logged what it begins with, and is not rebuilt yet.
            os.kill(_until(directory, 2, "regrouped"), signal.SIGKILL)
            return


def _until(directory: Path, global_rank: int, kind: str) -> int:
    """Wait for an event of a worker that there is; its pid."""
    started = [e for e in events.read(directory) if e["kind"] == "started"]
    pid = {e["global_rank"]: e["pid"] for e in started}[global_rank]
    own = directory / events.FOLDER / f"rank{global_rank}.{pid}.jsonl"
    next(line for line in follow(own) if f'"kind":"{kind}"' in line)
    return int(pid)


def _wake(pids: list[int]) -> bool:
    """Let stopped processes go on, workers first; whether all end by themselves."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    ended = [readable(pidfd, 60) for pidfd in pidfds]
    return all(ended)


@pytest.mark.parametrize("cut", CUTS)
def test_a_node_is_replaced_by_another_one(runner: Runner, off: Run, cut: str) -> None:
    flags = ["--moetion", "--moetion-cut", cut, "--moetion-window", str(WINDOW)]
    # Nobody comes to another commit point before the workers are killed, and the node is lost.
    held = [f"hold:global_rank=0,iteration={i},at=start" for i in (UNLIKE, UNLIKE + 1)]
    flags += ["--moetion-replicas", "1", "--moetion-fault", ";".join(held)]
    run = runner.run(
        f"node-loss-{cut}",
        iterations=ITERATIONS,
        workers_of_node=[2, 2],
        flags=flags,
        script=ORDERED,
        # A window before there is another order.
        env={"MOETION_TEST_TURN": f"2:{CHANGED - WINDOW}"},
        meddle=_lose,
        restarts=True,
        standbys=1,
    )
    codes = [int((run.directory / f"launcher-{node}.code").read_text()) for node in range(3)]
    assert codes == [0, 0, 0], run.tail()
    # Then it was started again, and stood by until the end.
    assert len(run.events("lapsed")) == 1
    assert [e["recovered"] for e in run.recoveries] == [
        [2, 3], [3], [2, 3], [0, 2], [2, 3],
    ]  # fmt: skip
    assert [e["why"].split(",")[0] for e in run.events("node-lost")] == [
        "connection closed",
        "silent for 4 s",
        "connection closed",
    ]
    assert (run.directory / STALE).read_text() == "True"
    if cut == "stage":
        ordered = {e["who"] for e in run.events("scheduled") if e["first"] == CHANGED}
        assert ordered == {"rank2"}
        plans = [e["plan"] for e in run.events("planned") if "plan" in e]
        assert f"stage 1: base {CHANGED + 1 - WINDOW}, replay" in plans[-1]
    assert_same_bits(run, off, ITERATIONS, lines_may_repeat=True)


FOUR_STAGES: dict[str, Any] = test_variants.VARIANTS["four-stages"]
SERVED = 13
"""Rank 2 is killed in the iteration behind this one, and node 1 when it has given rank 2 a part of
what that needs for its replay.
"""
SEVERAL = {4: ([2], []), 5: ([], [1]), 8: ([1], []), 9: ([], [0, 2])}
"""{iteration whose log line is waited for: (nodes that are lost then, workers that are killed)}."""


def _lose_several(directory: Path) -> None:
    left = {**SEVERAL, SERVED: ([], [])}
    for line in follow(directory / "log"):
        for iteration in [i for i in left if f" iteration {i:8d}/" in line]:
            nodes, ranks = left.pop(iteration)
            for node in nodes:
                kill_agent(directory, node)
            kill_workers(directory, ranks)
        if not left:
            break
    _until(directory, 0, "fault")
    (leader,) = (directory / events.FOLDER).glob("agent-0.*")
    told = follow(leader, after=leader.stat().st_size)
    kill_workers(directory, [2])
    next(line for line in told if '"kind":"gathered"' in line)
    told.close()
    _until(directory, 2, "fault")
    kill_agent(directory, 1)


def test_stages_that_are_lost_together_are_replayed_together(runner: Runner) -> None:
    """Node 1 is the second of four stages, node 2 the last two. Workers of other stages are killed
    while what they need of the lost ones is what those have sent once more in their replay; and at
    last a node while it serves one of them.
    """
    last = SERVED + 4
    off, *_ = test_variants.reference(runner, "four-stages")
    flags = ["--moetion", "--moetion-window", str(WINDOW), "--moetion-replicas", "1"]
    # Nobody comes to another commit point before that, and rank 2 has replayed one iteration.
    held = f"hold:global_rank=0,iteration={SERVED + 1},at=start"
    flags += ["--moetion-fault", f"{held};hold:global_rank=2,iteration={SERVED},at=replay:1"]
    run = runner.run(
        "node-loss-joint",
        iterations=last,
        workers_of_node=[1, 1, 2],
        flags=flags,
        meddle=_lose_several,
        restarts=True,
        **FOUR_STAGES,
    )
    assert run.code == 0, run.tail()
    assert [e["recovered"] for e in run.recoveries] == [[2, 3], [1], [1], [0, 2], [1, 2]]
    # The leader's event of this kind says who is dead.
    (plan,) = {e["plan"] for e in run.events("planned") if e["epoch"] == 1 and "plan" in e}
    assert re.search(r"stage 2: base (\d+), .*; stage 3: base \1,", plan), plan
    assert_same_bits(run, off, last, lines_may_repeat=True)
