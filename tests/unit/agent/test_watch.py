"""What an agent sees of its workers: pages, processes, answers to pings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_moetion.agent.hangs import STOPPED
from megatron_moetion.agent.watch import Watch, state_of
from megatron_moetion.progress import SET_UP, Progress


class Node:
    """Two ranks whose processes are real, and what its agent says and is told."""

    def __init__(self, pids: dict[int, int]) -> None:
        self.pinged: list[tuple[int, int]] = []
        self.told: list[dict[str, Any]] = []
        pid_of = lambda rank: pids.get(rank, 0)  # noqa: E731
        self.watch = Watch((4, 5), pid_of, self.notify, self.told.append)

    def notify(self, rank: int, message: dict[str, Any]) -> None:
        assert message["op"] == "ping"
        self.pinged.append((rank, message["number"]))

    def seen(self) -> list[dict[str, Any]]:
        (told,) = self.told
        assert told["op"] == "looked"
        del self.told[:]
        return told["seen"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_without_pings_the_answer_is_given_at_once() -> None:
    node = Node({4: os.getpid()})
    progress = Progress(node.watch.page_for(4))
    progress.at("backward", 7, 2)
    progress.waits(1)
    node.watch.look(1, 0.0)
    here, other = node.seen()
    assert node.watch.seconds_left() is None
    expected = {"global_rank": 4, "pid": os.getpid(), "iteration": 7, "place": "backward:2"}
    assert here.items() >= {**expected, "waiting": True, "answers": None, "step": None}.items()
    assert 0 <= here["seconds"] < 10
    # Rank 5 has no process, nor a page.
    assert (other["pid"], other["state"], other["place"]) == (0, "", SET_UP)


def test_pings_are_waited_for_and_then_it_is_seen_anew() -> None:
    node = Node({4: os.getpid(), 5: os.getpid()})
    progress = Progress(node.watch.page_for(4))
    node.watch.look(7, 600.0)
    assert node.pinged == [(4, 7), (5, 7)]
    node.watch.pong(4, 7)
    node.watch.pong(5, 6)
    assert node.told == []
    assert 590 < (node.watch.seconds_left() or 0) <= 600
    progress.at("end", 9)
    node.watch.pong(5, 7)
    assert [(each["answers"], each["iteration"]) for each in node.seen()] == [(True, 9), (True, 0)]


def test_who_does_not_answer_in_time_is_told_and_a_stopped_process_is_not_asked(
    sleeper: subprocess.Popen[bytes],
) -> None:
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
    assert state_of(sleeper.pid) == STOPPED
    node = Node({4: os.getpid(), 5: sleeper.pid})
    node.watch.look(1, 1e-9)
    while not node.told:
        node.watch.tick()
    mine, stopped = node.seen()
    assert node.pinged == [(4, 1)]
    assert mine["answers"] is False
    assert (stopped["answers"], stopped["state"]) == (None, STOPPED)


def test_a_new_process_begins_a_new_page_and_the_end_of_one_closes_it() -> None:
    node = Node({4: os.getpid()})
    first = node.watch.page_for(4)
    Progress(first).at("end", 9)
    second = node.watch.page_for(4)
    node.watch.look(1, 0.0)
    assert node.seen()[0]["place"] == SET_UP
    node.watch.forget(4)
    node.watch.forget(4)
    assert not os.path.exists(second)


def test_there_is_no_state_of_a_process_that_has_ended(sleeper: subprocess.Popen[bytes]) -> None:
    assert state_of(sleeper.pid) in "SR"
    sleeper.kill()
    sleeper.wait()
    assert state_of(sleeper.pid) == ""
