"""An agent whose main loop stands still is not there, whatever its other threads say."""

from __future__ import annotations

import linecache
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.agent.headway import LOOKS, Headway, Looks, limit, say
from megatron_moetion.agent.standby import LAPSED_CODE
from tests.stub_jobs import gone
from tests.stub_nodes import Nodes, ended

WAIT_SECONDS = 60
SHORT = timedelta(seconds=1)
TIMEOUT = 12
"""Seconds of --moetion-timeout: the loop of node 0 may stand still for that, others two leases."""


@given(st.lists(st.sampled_from([None, 1, 2]), max_size=80))
def test_a_loop_stands_still_exactly_when_the_last_looks_have_all_seen_one_turn(
    turns: list[int | None],
) -> None:
    looks = Looks()
    for number, turn in enumerate(turns, start=1):
        last = turns[max(0, number - LOOKS - 1) : number]
        expected = turn is not None and last == [turn] * (LOOKS + 1)
        assert looks.stands(turn) == expected


def test_a_limit_is_longer_than_a_silent_peer_is_waited_for_and_longest_on_node_0() -> None:
    minutes, lease = timedelta(minutes=10), timedelta(seconds=4)
    assert limit(minutes, lease, node_rank=0) == minutes
    assert limit(minutes, lease, node_rank=3) == minutes / 4
    assert limit(lease, lease, node_rank=3) == 2 * lease


def test_where_it_stands_is_told_without_a_look_at_the_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What hangs may be the file system that they are on."""
    for name in ("getline", "getlines", "checkcache", "updatecache", "lazycache"):
        monkeypatch.delattr(linecache, name)
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    headway = Headway(SHORT, told.put)
    headway.start()
    with headway.turn():
        where = told.get(timeout=WAIT_SECONDS)
        headway.stop()
    assert where.startswith("test_where_it_stands_is_told_without_a_look_at_the_sources (")
    assert f"{__file__}:" in where


def test_a_turn_that_lasts_is_told_with_where_it_is_and_never_goes_on() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    never, on = threading.Event(), threading.Event()

    def loop() -> None:
        headway = Headway(SHORT, told.put)
        headway.start()
        for _ in range(3):
            with headway.turn():
                pass
        with headway.turn():
            never.wait()
        on.set()

    threading.Thread(target=loop, daemon=True).start()
    where = told.get(timeout=WAIT_SECONDS)
    assert where.startswith("wait (")
    assert "threading.py:" in where
    never.set()
    assert not on.wait(SHORT.total_seconds())


def test_whoever_waits_for_something_to_do_or_has_stopped_is_not_told() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    waits, ends = Headway(SHORT, told.put), Headway(SHORT, told.put)
    for headway in (waits, ends):
        headway.start()
    with waits.turn():
        pass
    with ends.turn():
        ends.stop()
        with pytest.raises(queue.Empty):
            told.get(timeout=2 * SHORT.total_seconds())
    waits.stop()


STOPPED = """
import os, sys
from datetime import timedelta
from megatron_moetion.agent.headway import Headway

headway = Headway(timedelta(seconds=float(sys.argv[1])), lambda where: os._exit(7))
headway.start()
with headway.turn():
    print("up", flush=True)
    sys.stdin.readline()
print("handled", flush=True)
"""


def test_time_for_which_the_process_was_stopped_is_no_standstill() -> None:
    seconds = 4.0
    command = [sys.executable, "-c", STOPPED, str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2 * seconds)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.readline() == "handled\n"
        assert process.wait() == 0


def test_a_line_that_standard_error_does_not_take_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, into = os.pipe()
    with os.fdopen(out, "rb") as read, os.fdopen(into, "w") as written:
        monkeypatch.setattr(sys, "stderr", written)
        say("one line", SHORT)
        assert os.read(read.fileno(), 100) == b"one line\n"
        filled = fill(written.fileno())
        say("another", timedelta(seconds=0.1))
        # Or the thread would write into a file that has this number next.
        while filled > 0:
            filled -= len(os.read(read.fileno(), filled))
        assert os.read(read.fileno(), 100) == b"another\n"


def fill(file: int) -> int:
    """Until a pipe takes no more; how much that was."""
    count = 0
    again = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            count += os.write(again, b"\n")
    except BlockingIOError:
        return count
    finally:
        os.close(again)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    shard = ("--moetion-cut", "shard", "--moetion-replicas", "1")
    nodes = Nodes(tmp_path, *shard, "--moetion-timeout", str(TIMEOUT), afresh=True)
    yield nodes
    nodes.close()


def hold_up(nodes: Nodes, node_rank: int, process: subprocess.Popen[str]) -> None:
    """The agent stands still, in a write to its standard error."""
    (spare, *_) = nodes.until("spare", 1, who=f"agent-{node_rank}")
    assert process.stderr is not None
    again = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY)
    fill(again)
    os.close(again)
    # It has a line to say about that.
    os.kill(spare["pid"], signal.SIGKILL)


@pytest.mark.multirank
def test_an_agent_that_stands_still_loses_its_place_and_a_leader_that_does_ends_the_job(
    nodes: Nodes,
) -> None:
    zero, one = nodes.members()
    assert isinstance(zero, subprocess.Popen)
    assert isinstance(one, subprocess.Popen)
    # Only of the others the standard error is to be filled.
    nodes.afresh = False
    second = nodes.standby()
    stale = nodes.worker(1)
    hold_up(nodes, 1, one)
    nodes.until("node-lost", 1, node_rank=1)
    nodes.until("resumed", 1, recovered=[1])
    assert gone(stale)
    assert ended(one)[0] == LAPSED_CODE

    worker = nodes.worker(0)
    hold_up(nodes, 0, zero)
    assert gone(worker, WAIT_SECONDS)
    # Now that it is read, there is room for the line.
    code, lines = ended(zero)
    assert code == LAPSED_CODE
    (line,) = [line for line in lines if "stood still" in line]
    assert f"node 0: this agent has stood still for {TIMEOUT} s (see --moetion-timeout) in " in line
    assert line.endswith("; restart from a Megatron checkpoint with --load, or afresh")
    code, lines = ended(second)
    assert code == 1
    assert "the leader, node 0, is gone" in lines[-1]
