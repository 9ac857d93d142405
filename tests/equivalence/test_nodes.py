"""Two agents on loopback: each stage on a "node" of its own, so a replay reads its inbox over the
network.
"""

import pytest

from .harness import CUTS, Run, Runner, assert_same_bits, kills

FAILURES = [(3, 4, "backward:1"), (0, 9, "optimizer"), (2, 14, "end")]
ITERATIONS = 20


@pytest.mark.parametrize("cut", CUTS)
def test_a_worker_on_either_node_is_rebuilt(runner: Runner, off: Run, cut: str) -> None:
    flags = ["--moetion", "--moetion-cut", cut, *kills(*FAILURES)]
    run = runner.run(f"nodes-{cut}", iterations=ITERATIONS, nodes=2, flags=flags)
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, ITERATIONS)
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
