"""Strangers get nothing, hold nothing for long, and keep nobody else waiting."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import AuthenticationError
from pathlib import Path

import pytest

from megatron_moetion.agent.gate import MAX_WAITING
from megatron_moetion.agent.wire import KNOCK_BYTES, Channel, is_knock, knock
from megatron_moetion.events import read
from tests.agents_here import SECRET, AgentsHere

SHORT = timedelta(seconds=0.5)
LONG = timedelta(seconds=60)
WAIT_SECONDS = 20


@pytest.fixture
def made() -> Iterator[list[AgentsHere]]:
    made: list[AgentsHere] = []
    yield made
    for agents in made:
        agents.close()


def connect(agents: AgentsHere, said: bytes = b"") -> socket.socket:
    stranger = socket.create_connection(("127.0.0.1", agents.ports[0]))
    stranger.sendall(said)
    return stranger


def is_served(agents: AgentsHere) -> bool:
    channel = agents.channel(0)
    channel.send({"op": "vault"})
    channel.send({"op": "fetch", "global_rank": 0, "key": "frame/1/x"})
    answer = channel.receive()["op"]
    channel.close()
    return answer == "missing"


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def assert_no_thread_is_left(before: set[threading.Thread]) -> None:
    """Every thread that has begun since ends, in time: those of connections that have ended."""
    deadline = time.monotonic() + WAIT_SECONDS
    for thread in threads() - before:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), f"{thread} waits for ever"


def test_a_knock_is_made_and_known_by_the_secret_only() -> None:
    first, second = knock(SECRET), knock(SECRET)
    assert len(first) == KNOCK_BYTES
    assert first != second
    assert is_knock(first, SECRET)
    assert not is_knock(first, b"wrong")
    assert not is_knock(secrets.token_bytes(KNOCK_BYTES), SECRET)


def test_a_wrong_secret_and_garbage_are_turned_away_at_once_and_counted(
    made: list[AgentsHere], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made.append(agents := AgentsHere(1, patience=LONG, directory=tmp_path))
    with pytest.raises(AuthenticationError):
        Channel.to_peer("127.0.0.1", agents.ports[0], b"wrong")
    for garbage in (b"GET / HTTP/1.1\r\nHost: x\r\n" * 10, os.urandom(1 << 16)):
        with connect(agents) as stranger:
            # It may hang up before all of it is written.
            try:
                stranger.sendall(garbage)
                assert stranger.recv(1) == b""
            except ConnectionError:
                continue
    agents.await_count(0, "strangers without the secret", 3)
    assert is_served(agents)
    emitted = [event["number"] for event in read(tmp_path) if event["kind"] == "strangers"]
    assert emitted == [1, 2]
    assert capfd.readouterr().err.count("a stranger was turned away (without the secret)") == 1


def test_what_was_overheard_opens_nothing(made: list[AgentsHere]) -> None:
    made.append(agents := AgentsHere(1, patience=SHORT))
    overheard = knock(SECRET)
    with connect(agents, overheard) as first:
        # It is challenged, and has no answer.
        assert first.recv(1) != b""
        first.settimeout(30)
        while first.recv(1 << 12):
            pass
    with connect(agents, overheard) as again:
        assert again.recv(1) == b""
    agents.await_count(0, "strangers", 2)
    assert is_served(agents)


@pytest.mark.parametrize(
    "said", [b"", knock(SECRET)[: KNOCK_BYTES // 2]], ids=["nothing", "half a knock"]
)
def test_silence_and_half_a_message_are_ended_in_time(made: list[AgentsHere], said: bytes) -> None:
    made.append(agents := AgentsHere(1, patience=SHORT))
    with connect(agents, said) as stranger:
        assert is_served(agents)
        assert stranger.recv(1) == b""
    agents.await_count(0, "strangers silent", 1)


def test_half_a_message_behind_a_knock_is_ended_in_time(made: list[AgentsHere]) -> None:
    made.append(agents := AgentsHere(1, patience=SHORT))
    # It knows the secret and stops in the middle of the challenge: no thread waits for ever.
    before = threads()
    with connect(agents, knock(SECRET) + b"\x00\x00") as stranger:
        stranger.settimeout(30)
        while stranger.recv(1 << 12):
            pass
    agents.await_count(0, "strangers", 1)
    assert is_served(agents)
    assert_no_thread_is_left(before)


def test_a_thousand_silent_connections_cost_no_thread_and_keep_nobody_waiting(
    made: list[AgentsHere],
) -> None:
    made.append(agents := AgentsHere(1, patience=LONG))
    before = threads()
    with contextlib.ExitStack() as strangers:
        for number in range(1000):
            strangers.enter_context(connect(agents, b"x" * (number % 3)))
        assert is_served(agents)
        # They fill up the room there is, and each that comes later displaces one; the gate has seen
        # all of them, since it serves in order of arrival.
        agents.await_count(0, "strangers displaced", 1000 - MAX_WAITING)
        assert is_served(agents)
        assert_no_thread_is_left(before)


def test_somebody_who_reads_nothing_holds_up_nobody_else(made: list[AgentsHere]) -> None:
    made.append(agents := AgentsHere(1, patience=LONG))
    slow = [connect(agents, knock(SECRET)) for _ in range(8)]
    assert is_served(agents)
    for stranger in slow:
        stranger.close()
    agents.await_count(0, "strangers gone", 8)
