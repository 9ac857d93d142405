"""Operators that are captured in parts, over several frames, come back bit for bit."""

import pytest

from .harness import Run, Runner, assert_same_bits, assert_within_claim, kills

WINDOW, SPLIT, ITERATIONS = 3, 8, 24
FAILURES = [(3, 6, "backward:1"), (1, 13, "optimizer"), (2, 20, "end")]
"""Both stages, and each of the three places of a window."""


@pytest.mark.parametrize("policy", ["rolling", "tumbling"])
def test_a_stage_whose_operators_are_captured_in_parts_is_rebuilt_bit_for_bit(
    runner: Runner, off: Run, policy: str
) -> None:
    flags = ["--moetion", "--moetion-window", str(WINDOW), "--moetion-window-policy", policy]
    flags += ["--moetion-split", str(SPLIT), *kills(*FAILURES)]
    run = runner.run(f"split-{policy}", iterations=ITERATIONS, flags=flags)
    assert run.code == 0, run.tail()
    scheduled = run.events("scheduled")
    # Experts, the embedding or the output head, and the rest of a layer; all but the router.
    assert all(len(e["split"]) == 4 and min(e["split"].values()) > 1 for e in scheduled), scheduled
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
    assert_same_bits(run, off, ITERATIONS)
    assert_within_claim(run)
