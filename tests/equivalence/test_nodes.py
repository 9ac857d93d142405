"""Two agents on loopback: each stage on a "node" of its own, so a replay reads its inbox over the
network. A thousand strangers connect to the agents meanwhile.
"""

from pathlib import Path

import pytest

from megatron_moetion.agent.gate import MAX_WAITING
from tests.ports import free_port
from tests.strangers import agents_port, attack

from .harness import CUTS, LIMIT_SECONDS, Run, Runner, assert_same_bits, follow, kills

FAILURES = [(3, 4, "backward:1"), (0, 9, "optimizer"), (2, 14, "end")]
ITERATIONS = 20


@pytest.mark.parametrize("cut", CUTS)
def test_a_worker_on_either_node_is_rebuilt(runner: Runner, off: Run, cut: str) -> None:
    flags = ["--moetion", "--moetion-cut", cut, *kills(*FAILURES)]
    port, kept = free_port(), []

    def connect(directory: Path) -> None:
        # While they train, and until they are done.
        next(line for line in follow(directory / "log") if " iteration        2/" in line)
        for node in (0, 1):
            kept.extend(attack(agents_port(port, node, LIMIT_SECONDS)))

    name = f"nodes-{cut}"
    options = {"nodes": 2, "meddle": connect, "port": port, "afresh": cut == "stage"}
    run = runner.run(name, iterations=ITERATIONS, flags=flags, **options)
    for stranger in kept:
        stranger.close()
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, ITERATIONS)
    for counted in run.events("counted"):
        # The last ones may still have been waiting, silent, when the job was over.
        assert counted["strangers"] >= 1005 - MAX_WAITING
        assert counted["strangers without the secret"] >= 5
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
