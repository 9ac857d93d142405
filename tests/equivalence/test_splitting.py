"""Operators that are captured in parts, over several frames, come back bit for bit."""

import pytest

from .harness import Run, Runner, assert_same_bits, assert_within_claim, kills

WINDOW, SPLIT, ITERATIONS = 3, 16, 24
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
    # What lies on the two edges between the slots: an expert, and the embedding or output head.
    split = {(e["who"], name): n for e in run.events("scheduled") for name, n in e["split"].items()}
    first, last = "chunk0.embedding", "chunk0.output_layer"
    expert = "chunk0.decoder.layers.0.expert.1"
    assert split == {
        **{(f"rank{rank}", expert): 5 for rank in range(4)},
        **{(f"rank{rank}", first if rank < 2 else last): 4 for rank in range(4)},
    }
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
    assert_same_bits(run, off, ITERATIONS)
    assert_within_claim(run)
