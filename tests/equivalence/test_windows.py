"""The schedule changes while training: windows, policies, parts and orders, with failures at the
edges.

What is measured comes from a script, so the changes come where the failures are.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from .harness import Run, Runner, assert_same_bits, assert_within_claim, kills

PACED = Path(__file__).with_name("paced_pretrain.py")
PACE = "1:0.2:501000,12:0.3:331000,22:0.2:254000,36:0.3:204000,60:0.2:331000"
"""Seconds of an iteration, and bytes of a frame that can be copied meanwhile, from an iteration on.

A dense frame of any rank has less than 501000 bytes, the largest frame of a rolling window of 2 and
3 less than 331000 and 254000; where 204000 are the limit, tumbling windows of 5 with parts replay
less than rolling ones.
"""
CHANGES = [
    (1, 4, "rolling"),
    (5, 1, "rolling"),
    (13, 2, "rolling"),
    (23, 3, "rolling"),
    (38, 5, "tumbling"),
    (63, 2, "rolling"),
]
"""(first iteration, window, policy)."""
FAILURES = (
    # Before the decision, and with the new window begun but the old frames the only base.
    (3, 4, "backward:1"),
    (0, 5, "optimizer"),
    # Behind the decision, in the same iteration, and in the next one.
    (1, 12, "capture"),
    (3, 13, "backward:0"),
    (2, 22, "optimizer"),
    (1, 23, "forward:2"),
    (3, 25, "end"),
    (2, 37, "param-gather"),
    (1, 38, "backward:1"),
    # Some parts of operators are in, others are not.
    (0, 44, "capture"),
    (2, 52, "backward:1"),
    (1, 62, "norm"),
    (3, 63, "grad-sync"),
    (0, 64, "backward:0"),
)
ITERATIONS = 72


def _schedules(run: Run, global_rank: int) -> dict[int, dict[str, Any]]:
    """What a rank captured by, by first iteration; the later of two decisions counts."""
    told = [e for e in run.events("scheduled") if e["who"] == f"rank{global_rank}"]
    return {e["first"]: e for e in sorted(told, key=lambda e: e["first"])}


def test_every_change_of_the_schedule_is_recovered_from_bit_for_bit(
    runner: Runner, off: Run
) -> None:
    run = runner.run(
        "windows",
        iterations=ITERATIONS,
        flags=["--moetion", *kills(*FAILURES)],
        script=PACED,
        env={"MOETION_TEST_PACE": PACE},
    )
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, ITERATIONS)
    assert_within_claim(run)
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
    for global_rank in range(4):
        found = _schedules(run, global_rank)
        kinds = [(first, e["window"], e["policy"]) for first, e in found.items()]
        starts = [kinds[0]] + [b for a, b in pairwise(kinds) if a[1:] != b[1:]]
        assert starts == CHANGES
        assert bool(found[38]["split"]), "nothing was captured in parts"
    orders = [
        [part[0] for parts in e["slots"] for part in parts if ".expert." in part[0]]
        for rank in range(4)
        for e in _schedules(run, rank).values()
        if e["policy"] == "rolling" and e["window"] > 1
    ]
    assert len({tuple(order) for order in orders}) > 1, "experts were never put in another order"
    said = [line for line in run.log.splitlines() if line.startswith("moetion: from iteration")]
    assert [line.split()[3] for line in said] == [str(first) for first, *_ in CHANGES[1:]]
