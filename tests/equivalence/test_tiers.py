"""One tier after the other, in one job, until none is left; bit for bit as long as it trains."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from .harness import CUTS, LINE, OVER, Run, Runner, assert_same_bits, kill_workers, kills
from .test_spill import at_event

FLAGS = ["--moetion-window", "3", "--moetion-spill-interval", "1", "--save-interval", "14"]
BUDGET = ["--moetion-restart-budget", "1/3600"]
PLACES = (
    (3, 5, "backward:1"),
    (0, 7, "optimizer"),
    (1, 10, "forward:2"),
    (2, 13, "norm"),
    # The spill was of an iteration before, and here the checkpoint is there.
    (0, 16, "end"),
    (3, 18, "backward:2"),
    (1, 20, "forward:1"),
    (2, 22, "backward:2"),
)
"""One within the budget of each tier, and one that is too many."""
SAVED, LAST = 14, 22


@pytest.mark.parametrize("cut", CUTS)
def test_failures_past_the_budget_go_down_the_tiers_to_a_line_that_says_what_was_tried(
    runner: Runner, off: Run, cut: str
) -> None:
    saved = str(runner.scratch / f"tiers-{cut}-saved")
    flags = ["--moetion", "--moetion-cut", cut, *FLAGS, *BUDGET, *kills(*PLACES)]
    flags += ["--save", saved, "--load", saved]
    run = runner.run(f"tiers-{cut}", iterations=40, flags=flags)
    assert run.code == 137, run.tail()
    # Whenever it starts, Megatron's second line shows the mean of two iterations.
    others = [line for line in run.lines if line not in off.lines]
    assert [int(line[0]) for line in others] == [SAVED + 2]
    kept = [text for text in run.log.splitlines() if line_of(text) not in others]
    assert_same_bits(replace(run, log="\n".join(kept)), off, LAST - 1, lines_may_repeat=True)
    recovered = [e["recovered"] for e in run.recoveries]
    everybody = [0, 1, 2, 3]
    assert recovered == [[3], everybody, [1], everybody, [0], [1]]
    reason = "more than 1 recoveries within 3600 s (--moetion-restart-budget 1/3600)"
    steps = [(e["tier"], e["reason"]) for e in run.events("escalated")]
    tiers = ["memory restart", "spill", "Megatron checkpoint"]
    assert steps == [(tier, reason) for tier in tiers]
    fell_back = [(e["tier"], e["iteration"], e["committed"]) for e in run.events("fell-back")]
    spilled = fell_back[0][1]
    assert 6 <= spilled <= 12
    assert fell_back == [("spill", spilled, 12), ("Megatron checkpoint", SAVED, 17)]
    anew = "all workers start anew from"
    said = [line for line in run.log.splitlines() if reason in line]
    assert said[0].startswith(f"moetion-run: {reason}; memory restart: {anew} what memory holds")
    again = f"iterations {SAVED + 1} to 17 are run again"
    assert (
        said[2]
        == f"moetion-run: {reason}; {again}; {anew} the Megatron checkpoint of iteration {SAVED}"
    )
    assert said[1].endswith(f"{anew} the spill of iteration {spilled}")
    tried = "tried: 4 localized recoveries, memory restart, spill, Megatron checkpoint"
    assert said[3].startswith(f"moetion-run: ending the job: {reason}; {tried}; the same command")
    assert len(said) == 4


def line_of(text: str) -> tuple[str, ...] | None:
    found = LINE.search(text)
    return None if found is None else found.groups()


DIVERGED = Path(__file__).with_name("nan_pretrain.py")
NAN_FROM = 19
POISONED = 16
"""The spill of that iteration holds frames 13 to 16."""
STEADY = ["--moetion-window", "4", "--moetion-popularity", "none", "--moetion-spill-interval", "1"]
"""Bases are counted here."""


@pytest.mark.parametrize("cut", CUTS)
def test_nan_behind_a_rebuild_costs_what_it_came_from_its_trust_tier_by_tier(
    runner: Runner, off: Run, cut: str
) -> None:
    # There is an older base without the first poisoned frame. The second one is in a spill, too,
    # whose checksums are right, and once that is there memory has nothing else to begin with.
    faults = [poison(3, 9), kill(3, 10), poison(2, 13)]
    faults.append("corrupt:global_rank=2,iteration=17,at=capture")
    faults.append(f"hold:global_rank=0,iteration={NAN_FROM},at=start")
    flags = ["--moetion", "--moetion-cut", cut, *STEADY, "--moetion-fault", ";".join(faults)]
    # Else the host runs the iteration again and ends to be started on other devices.
    flags += ["--rerun-mode", "disabled"]
    meddle = at_event("spilled", lambda run: kill_workers(run, (2,)), iteration=POISONED)
    env = {"MOETION_TEST_NAN_FROM": str(NAN_FROM)}
    options = {"flags": flags, "script": DIVERGED, "env": env, "meddle": meddle}
    run = runner.run(f"nan-{cut}", iterations=40, **options)
    assert run.code == 1, run.tail()
    # Rebuilt from what was poisoned, no rank ends with other bits.
    assert_same_bits(run, off, NAN_FROM - 1, lines_may_repeat=True)
    quarantined = {(e["global_rank"], e["key"]) for e in run.events("quarantined")}
    assert {(3, "frame/9/state"), (2, "frame/13/state")} <= quarantined
    assert run.log.count("not finite when it was sealed: main of ") >= 2
    # The poisoned spill is looked through and not begun from twice: the one before is next. What
    # training has made again since is no further than that.
    fell_back = [(e["tier"], e["iteration"]) for e in run.events("fell-back")]
    assert fell_back == [("spill", POISONED), ("spill", POISONED - 4)]
    spilled = Counter(e["iteration"] for e in run.events("spilled"))
    assert [iteration for iteration, times in spilled.items() if times > 1] == [POISONED]
    # What is NaN whatever it begins with goes down to the last tier, with what was raised first.
    steps = [e["tier"] for e in run.events("escalated")]
    assert steps == ["memory restart", "spill"]
    shown, _, last = run.log.removesuffix(OVER).rpartition("moetion-run: ending the job: ")
    assert "\n" not in last.strip()
    assert last.startswith("what was rebuilt from memory gives results that the host rejects: ")
    tried = r"; tried: \d localized recoveries, memory restart, 2 spills; restart from a Megatron"
    assert re.search(tried, last), last
    raised = shown.rpartition("raised first:\n")[2].splitlines()
    assert "nan" in raised[-1]
    assert all(line.startswith("[rank") for line in raised)


def poison(global_rank: int, iteration: int) -> str:
    return f"poison:global_rank={global_rank},iteration={iteration},at=capture"


def kill(global_rank: int, iteration: int) -> str:
    return f"kill:global_rank={global_rank},iteration={iteration},at=backward:1"
