"""SIGTERM and Ctrl-C at any moment: within 10 s nothing is left, and the code is what a scheduler
expects.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stub_nodes import END_SECONDS, TICK_SECONDS, Nodes, ended

pytestmark = pytest.mark.multirank
Make = Callable[..., Nodes]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Nodes] = []

    def make(*script: str, afresh: bool = False, **env: str) -> Nodes:
        words = [*script, "--moetion-hang-factor", "0"]
        made.append(Nodes(tmp_path, *words, afresh=afresh, **env))
        return made[-1]

    yield make
    for nodes in made:
        nodes.close()


def assert_ends(nodes: Nodes, number: signal.Signals) -> None:
    assert nodes.leader is not None
    nodes.leader.send_signal(number)
    signalled = time.monotonic()
    code, lines = ended(nodes.leader, END_SECONDS)
    print(f"{time.monotonic() - signalled:.2f} s after {number.name}")
    assert code == 128 + number, lines
    nodes.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("how", ["stop", "spin"])
def test_with_a_worker_that_does_nothing_more(make: Make, how: str, number: signal.Signals) -> None:
    nodes = make("--die", f"1:20:{how}")
    nodes.alone(2)
    nodes.until("dying", 1)
    assert_ends(nodes, number)


@pytest.mark.parametrize("phase", ["freeze", "verdict", "abort", "facts"])
def test_in_every_phase_of_a_recovery(make: Make, phase: str) -> None:
    # The phase waits for one that is stopped.
    nodes = make("--die", "1:20", "--die", f"0:{phase}@1:stop")
    nodes.alone(2)
    nodes.until("dying", 1, how="stop")
    assert_ends(nodes, signal.SIGTERM)


def test_while_a_spare_still_imports_and_all_workers_wait_for_it(
    make: Make, tmp_path: Path
) -> None:
    here = tmp_path / "imports"
    lines = ["import pathlib, signal", f"pathlib.Path({str(here)!r}).touch()", "signal.pause()"]
    (tmp_path / "endless.py").write_text("\n".join(lines))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    nodes = make(afresh=True, MOETION_PREIMPORT="endless", PYTHONPATH=path)
    nodes.argv = ["--nproc-per-node", "2"]
    nodes.leader = nodes.start(label="rack-0")
    # The agent may not have its handlers yet: until then it ends as any program does.
    nodes.until("began", 1)
    while not here.exists():
        assert nodes.leader.poll() is None
        time.sleep(TICK_SECONDS)
    nodes.leader.send_signal(signal.SIGTERM)
    code, said = ended(nodes.leader, END_SECONDS)
    assert code == 128 + signal.SIGTERM, said
    assert not [event for event in nodes.events() if event["kind"] == "started"]
    run_id = nodes.events()[0]["run_id"]
    assert f"moetion-{run_id}" not in Path("/proc/net/unix").read_text()


def test_while_all_are_ended_to_start_anew_from_a_spill_nothing_starts_anew(make: Make) -> None:
    deaths = [word for at in (20, 30, 40, 50) for word in ("--die", f"1:{at}")]
    budget = ["--moetion-restart-budget", "1/3600"]
    spill = ["--moetion-spill-interval", "1", "--spill-at", "4"]
    # It takes the agent a while to end them.
    nodes = make(*deaths, *budget, *spill, "--ignore-sigterm")
    nodes.alone(2)
    nodes.until("fell-back", 1)
    assert_ends(nodes, signal.SIGTERM)
    assert [event["tier"] for event in nodes.events() if event["kind"] == "escalated"] == [
        "memory restart",
        "spill",
    ]
    assert len([event for event in nodes.events() if event["kind"] == "began"]) == 1
