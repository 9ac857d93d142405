"""One tier after the other, in one job, until none is left; bit for bit as long as it trains."""

from __future__ import annotations

import pytest

from .harness import CUTS, Run, Runner, assert_same_bits, kills

SPILLS = ["--moetion-window", "3", "--moetion-spill-interval", "1"]
BUDGET = ["--moetion-restart-budget", "2/3600"]
PLACES = (
    (3, 6, "backward:1"),
    (0, 8, "optimizer"),
    (1, 11, "forward:2"),
    (2, 13, "backward:0"),
    (0, 15, "end"),
    (3, 18, "norm"),
    (1, 20, "backward:2"),
    (3, 22, "forward:1"),
    (2, 24, "backward:3"),
)
"""Two within the budget of each tier, and one that is too many."""
LAST = 24


@pytest.mark.parametrize("cut", CUTS)
def test_failures_past_the_budget_go_down_the_tiers_to_a_line_that_says_what_was_tried(
    runner: Runner, off: Run, cut: str
) -> None:
    flags = ["--moetion", "--moetion-cut", cut, *SPILLS, *BUDGET, *kills(*PLACES)]
    run = runner.run(f"tiers-{cut}", iterations=40, flags=flags)
    assert run.code == 137, run.tail()
    assert_same_bits(run, off, LAST - 1, lines_may_repeat=True)
    recovered = [e["recovered"] for e in run.recoveries]
    everybody = [0, 1, 2, 3]
    assert recovered == [[3], [0], everybody, [2], [0], everybody, [1], [3]]
    reason = "more than 2 recoveries within 3600 s (--moetion-restart-budget 2/3600)"
    steps = [(e["tier"], e["reason"]) for e in run.events("escalated")]
    tiers = ["memory restart", "spill", "Megatron checkpoint"]
    assert steps == [(tier, reason) for tier in tiers]
    (fell_back,) = run.events("fell-back")
    assert fell_back["iteration"] >= 9
    said = [line for line in run.log.splitlines() if reason in line]
    assert said[0].startswith(f"moetion-run: {reason}; memory restart: all workers start anew")
    assert said[1].startswith(f"moetion-run: {reason}; all workers start anew from the spill of")
    tried = "tried: 6 localized recoveries, memory restart, spill"
    assert said[2].startswith(f"moetion-run: ending the job: {reason}; {tried}; the same command")
    assert len(said) == 3
