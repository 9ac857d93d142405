"""Two agents on loopback: each stage on a "node" of its own, so a replay reads its inbox over the
network.
"""

from .harness import Run, Runner, assert_same_bits, kills

FAILURES = [(3, 4, "backward:1"), (0, 9, "optimizer"), (2, 14, "end")]
ITERATIONS = 20


def test_a_worker_on_either_node_is_rebuilt_from_the_other_nodes_log(
    runner: Runner, off: Run
) -> None:
    run = runner.run(
        "nodes", iterations=ITERATIONS, nodes=2, flags=["--moetion", *kills(*FAILURES)]
    )
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, ITERATIONS)
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
