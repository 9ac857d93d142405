"""Who is silent is noticed in time, who is slow is not, and who was stopped knows it first."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.agent.lease import Leases, Pulse, Table, now
from megatron_moetion.agent.wire import Channel

SHORT = timedelta(seconds=1)
WAIT_SECONDS = 60


def pair() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return Channel(Connection(ours.detach())), Channel(Connection(theirs.detach()))


TIMES = st.lists(st.floats(0, 100), min_size=1, max_size=30).map(sorted)


@given(TIMES, st.floats(0.1, 20))
def test_an_agent_is_silent_exactly_when_its_last_beat_is_a_lease_ago(
    beats: list[float], lease: float
) -> None:
    table = Table(lease)
    assert table.grant("x", beats[0])
    for before, beat in pairwise(beats):
        if beat - before >= lease:
            assert table.left(beat) == 0.0
            assert table.take_silent(beat) == ["x"]
            # It cannot come back: its place may be given away.
            assert not table.renew("x", beat)
            assert not table.grant("x", beat)
            assert table.left(beat) is None
            return
        assert table.take_silent(beat) == []
        assert table.renew("x", beat)
    assert table.left(beats[-1]) == pytest.approx(lease)


@given(TIMES, st.floats(0.1, 5), st.floats(0, 5), st.floats(0, 3))
def test_the_agent_ends_by_its_own_clock_before_its_place_is_given_away(
    sent: list[float], lease: float, delay: float, skew: float
) -> None:
    """Whatever a beat takes on its way, and whatever the two clocks show."""
    table = Table(lease)
    table.grant("x", sent[0] + delay + skew)
    for at in sent:
        table.renew("x", at + delay + skew)
    agents_end = sent[-1] + lease
    leaders_end = (table.left(0.0) or 0.0) - skew
    assert leaders_end >= agents_end - 1e-6


def test_what_the_observer_slept_through_is_excused_but_not_more() -> None:
    table = Table(4.0)
    table.grant("x", 0.0)
    table.grant("y", 9.5)
    table.excuse(8.0, at=10.0)
    assert table.take_silent(10.0) == []
    assert table.left(10.0) == pytest.approx(2.0)
    assert table.take_silent(12.0) == ["x"]
    assert table.left(12.0) == pytest.approx(2.0), "y was heard after it woke up: at most now"


class Leader:
    """Leases, and agents that are connected to them."""

    def __init__(self, lease: timedelta = SHORT) -> None:
        self.silent: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.leases = Leases(lease, self.silent.put)
        self.leases.start()

    def pulse(self, agent: str, lapsed: queue.SimpleQueue[float | None]) -> tuple[Pulse, Channel]:
        ours, theirs = pair()

        def serve() -> None:
            assert theirs.receive() == {"op": "pulse", "agent": agent}
            self.leases.serve(theirs, agent)

        threading.Thread(target=serve, daemon=True).start()
        return Pulse(ours, agent, lapsed.put), theirs


def test_beats_keep_a_lease_and_silence_ends_it_on_both_sides() -> None:
    leader, lapsed = Leader(), queue.SimpleQueue()
    kept, _ = leader.pulse("kept", lapsed)
    assert kept.lease == SHORT
    _, cut = leader.pulse("cut", lapsed)
    began = now()
    cut.cut()
    assert leader.silent.get(timeout=WAIT_SECONDS) == "cut"
    assert now() - began >= 0.5
    # The agent was not stopped, it only heard nothing.
    assert lapsed.get(timeout=WAIT_SECONDS) is None
    # The other one has been renewed all the while.
    assert now() - began >= SHORT.total_seconds() * 0.8
    kept.check()
    assert leader.silent.empty()
    assert lapsed.empty()
    kept.stop()
    assert leader.silent.get(timeout=WAIT_SECONDS) == "kept"
    assert lapsed.empty(), "an agent whose job is over does not lapse"


def test_the_end_of_the_job_ends_the_leases_before_anybody_is_missed() -> None:
    leader, lapsed = Leader(), queue.SimpleQueue()
    pulse, _ = leader.pulse("x", lapsed)
    leader.leases.stop()
    pulse.stop()
    with pytest.raises(queue.Empty):
        leader.silent.get(timeout=2 * SHORT.total_seconds())
    assert lapsed.empty()


STOPPED = """
import os, signal, socket, sys
from multiprocessing.connection import Connection
from megatron_moetion.agent.lease import Pulse
from megatron_moetion.agent.wire import Channel

def lapsed(stopped_for):
    os.write(1, f"lapsed {stopped_for}\\n".encode())
    os._exit(7)

channel = Channel(Connection(int(sys.argv[1])))
pulse = Pulse(channel, "x", lapsed)
print("up", flush=True)
for line in sys.stdin:
    pulse.check()
    os.write(1, b"handled\\n")
"""


@pytest.fixture
def stopped() -> Iterator[tuple[subprocess.Popen[str], Leader]]:
    leader = Leader()
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(theirs.fileno())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    channel = Channel(Connection(ours.detach()))
    assert channel.receive()["op"] == "pulse"
    threading.Thread(target=leader.leases.serve, args=(channel, "x"), daemon=True).start()
    yield process, leader
    process.kill()
    process.communicate()


def test_one_that_was_stopped_handles_nothing_that_came_meanwhile(
    stopped: tuple[subprocess.Popen[str], Leader],
) -> None:
    process, leader = stopped
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.stdin.write("before\n")
    process.stdin.flush()
    assert process.stdout.readline() == "handled\n"
    process.send_signal(signal.SIGSTOP)
    process.stdin.write("meanwhile\n")
    process.stdin.flush()
    assert leader.silent.get(timeout=WAIT_SECONDS) == "x"
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=WAIT_SECONDS) == 7
    word, seconds = process.stdout.read().split()
    assert word == "lapsed"
    assert float(seconds) > SHORT.total_seconds() / 2
