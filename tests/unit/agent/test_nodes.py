"""Nodes that are lost, that stand by, and that come too late; how jobs on several nodes end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_moetion.agent.standby import LAPSED_CODE
from tests.ports import free_port
from tests.stub_jobs import gone, launch, protected
from tests.stub_nodes import END_SECONDS, LEASE, TICK_SECONDS, Nodes, ended

pytestmark = pytest.mark.multirank

SHARD = ["--moetion-cut", "shard", "--moetion-replicas", "1"]
Make = Callable[..., Nodes]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Nodes] = []

    def make(*script: str) -> Nodes:
        made.append(Nodes(tmp_path, *script))
        return made[-1]

    yield make
    for nodes in made:
        nodes.close()


def test_standbys_take_the_places_of_lost_nodes_in_turn_and_all_end_with_the_job(
    make: Make,
) -> None:
    nodes = make(*SHARD, "--ignore-sigterm")
    zero, one = nodes.members()
    first, second = nodes.standby(1), nodes.standby(2)
    assert [event["ahead"] for event in nodes.until("parked", 2)] == [0, 1]

    extra = nodes.start("--node-rank", "1", label="extra")
    code, lines = ended(extra)
    assert code == 1
    (line,) = lines
    assert "error: node rank 1 is taken" in line
    assert "--standby" in line

    stale = nodes.worker(1)
    stopped = time.monotonic_ns()
    one.send_signal(signal.SIGSTOP)
    (lost,) = nodes.until("node-lost", 1)
    seconds = (lost["monotonic_ns"] - stopped) / 1e9
    print(f"stopped to lost: {seconds:.2f} s with a lease of {LEASE} s")
    assert LEASE / 2 < seconds < LEASE + 1
    nodes.until("resumed", 1, recovered=[1])
    one.send_signal(signal.SIGCONT)
    code, lines = ended(one, END_SECONDS)
    assert code == LAPSED_CODE
    assert f"longer than its lease of {LEASE} s (--moetion-lease)" in lines[-1]
    assert sum("this agent was stopped for" in line for line in lines) == 1
    assert gone(stale)

    # Whoever was lost may come back as one that stands by.
    back = nodes.standby(3)
    assert nodes.until("parked", 3)[-1]["ahead"] == 1
    first.kill()
    nodes.until("resumed", 2, recovered=[1])
    code, lines = ended(first)
    assert lines[:2] == [
        "moetion-run: standing by for a node that is lost",
        "moetion-run: this standby takes the place of node 1",
    ]
    assert [event["node_rank"] for event in nodes.until("node-joined", 2)] == [1, 1]

    zero.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    codes = {name: ended(process) for name, process in
             {"zero": zero, "second": second, "back": back}.items()}  # fmt: skip
    assert time.monotonic() - signalled < END_SECONDS
    assert codes["zero"][0] == codes["second"][0] == 128 + signal.SIGTERM
    assert codes["zero"][1][-1] == "moetion-run: ending the job: node 0 got signal 15"
    assert codes["back"] == (0, [
        "moetion-run: standing by for a node that is lost, after 1 others",
        "moetion-run: the job is over; this standby ends with it",
    ])  # fmt: skip
    nodes.assert_nothing_is_left()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_the_loss_of_node_0_ends_all_others_within_a_lease_and_says_what_is_intact(
    make: Make, how: signal.Signals
) -> None:
    spill = ("--moetion-spill-interval", "1", "--spill-at", "4")
    nodes = make(*SHARD, *(spill if how is signal.SIGKILL else ()))
    zero, one = nodes.members()
    standby = nodes.standby()
    if how is signal.SIGKILL:
        nodes.until("spilled", 1)
    worker = nodes.worker(1)
    zero.send_signal(how)
    lost = time.monotonic()
    code, lines = ended(one)
    assert time.monotonic() - lost < LEASE + 1
    assert gone(worker)
    line = lines[-1]
    if how is signal.SIGKILL:
        assert code == 1
        assert "the leader, node 0, is gone" in line
        assert line.endswith("; the same command goes on from the spill of iteration 4")
    else:
        assert code == LAPSED_CODE
        assert f"nothing was heard of node 0, the leader, for {LEASE} s (--moetion-lease)" in line
        assert line.endswith("; restart from a Megatron checkpoint with --load, or afresh")
    assert "; tried: no tier, as node 0 hosts the job's store; " in line
    assert sum("this node ends" in line for line in lines) == 1, lines
    code, lines = ended(standby)
    assert code in (1, LAPSED_CODE)
    assert "the leader" in lines[-1]


def test_a_clean_end_leaves_nothing_behind_and_takes_the_standby_with_it(
    make: Make, tmp_path: Path
) -> None:
    # Without copies no node is replaced, and a standby disturbs nobody.
    over = tmp_path / "over"
    nodes = make("--moetion-replicas", "0", "--leave-behind", "--until", str(over))
    zero, one = nodes.members()
    standby = nodes.standby()
    over.touch()
    assert ended(zero)[0] == ended(one)[0] == 0
    code, lines = ended(standby)
    assert code == 0
    in_vain, dismissed = lines
    assert "standing by in vain: this job replaces no node" in in_vain
    assert dismissed == "moetion-run: the job is over; this standby ends with it"
    nodes.assert_nothing_is_left()
    left = [int(path.read_text()) for path in nodes.directory.parent.glob("left-*")]
    assert len(left) == 2
    assert all(gone(pid) for pid in left)


def test_ctrl_c_at_any_agent_ends_the_job_and_one_that_stands_by_just_leaves(
    make: Make, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    nodes = make(*SHARD, "--ignore-sigterm", "--broken", str(broken))
    early = nodes.start("--standby", label="spare")
    zero, one = nodes.members()
    nodes.until("parked", 1)
    early.send_signal(signal.SIGINT)
    assert ended(early, END_SECONDS)[0] == 128 + signal.SIGINT
    one.kill()
    nodes.until("node-lost", 1)
    one = nodes.start("--node-rank", "1", label="started by somebody")
    nodes.until("resumed", 1, recovered=[1])

    # Its worker dies, and the replacement finds the device broken: the node is given up.
    standby = nodes.standby(2)
    broken.touch()
    os.kill(nodes.worker(1), signal.SIGKILL)
    nodes.until("resumed", 2, recovered=[1])
    assert [event["node_rank"] for event in nodes.until("node-lost", 2)] == [1, 1]
    code, lines = ended(one)
    assert code == 1
    (line,) = [line for line in lines if "error" in line]
    assert "error: rank 1 of node 1: device ipu is broken" in line

    one = standby
    one.send_signal(signal.SIGINT)
    signalled = time.monotonic()
    codes = [ended(process)[0] for process in (zero, one)]
    assert time.monotonic() - signalled < END_SECONDS
    assert codes == [128 + signal.SIGINT] * 2
    nodes.assert_nothing_is_left()


def test_ctrl_c_before_the_nodes_have_met_ends_the_agent(tmp_path: Path) -> None:
    port = free_port()
    argv = ["--nnodes", "2", "--nproc-per-node", "1", "--master-port", str(port)]
    words = [*argv, "--node-rank", "0", "--failure-domain", "rack-0"]
    agent = launch(words, *protected(tmp_path), MOETION_SECRET="ab" * 16)
    # It listens, and waits for node 1 in the store.
    while f":{port:04X} " not in Path("/proc/net/tcp").read_text() + tcp6():
        with pytest.raises(subprocess.TimeoutExpired):
            agent.wait(TICK_SECONDS)
    agent.send_signal(signal.SIGINT)
    assert agent.wait(END_SECONDS) == -signal.SIGINT
    agent.communicate()


def tcp6() -> str:
    path = "/proc/net/tcp6"
    return Path(path).read_text() if os.path.exists(path) else ""
