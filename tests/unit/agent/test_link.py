"""The worker's connection: replies find their request, notices keep their order."""

from __future__ import annotations

import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

import pytest

from megatron_moetion.agent.link import ORPHAN_EXIT_CODE, AgentLink
from megatron_moetion.agent.wire import (
    KNOCK_BYTES,
    Channel,
    is_knock,
    listen_unix,
    write_all,
)
from megatron_moetion.vault.shelf import Unreachable

SECRET = b"\x01\x02"
PIECE_BYTES = 10_000


class Agent:
    """Answers every request with itself, after all that are in `before`; a payload comes in pieces,
    and all that are in `between` behind each, and `breaks` times only the first of them.
    """

    def __init__(self) -> None:
        self.name = f"@moetion-test-{secrets.token_hex(4)}"
        self.listener = listen_unix(self.name, 1)
        self.got: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.before: list[dict[str, Any]] = []
        self.between: list[dict[str, Any]] = []
        self.payload: bytes | None = None
        self.breaks = 0
        self.channel: Channel | None = None
        self.accepted = threading.Event()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        connection, _ = self.listener.accept()
        if not is_knock(connection.recv(KNOCK_BYTES, socket.MSG_WAITALL), SECRET):
            connection.close()
            return
        self.channel = Channel.accepted(Connection(connection.detach()), SECRET)
        self.accepted.set()
        try:
            while True:
                message = self.channel.receive()
                self.got.put(message)
                if "id" in message:
                    self.answer(message)
        except (EOFError, OSError):
            self.channel.close()

    def answer(self, message: dict[str, Any]) -> None:
        assert self.channel is not None
        for notice in self.before:
            self.channel.send(notice)
        if self.payload is None:
            self.channel.send(message)
            return
        for _ in range(self.breaks):
            # Whoever had it is gone in the middle.
            self.head(message)
            self.pieces(message, self.payload[: len(self.payload) // 3])
            self.channel.send({"op": "broken", "id": message["id"]})
        self.head(message)
        self.pieces(message, self.payload)

    def head(self, message: dict[str, Any]) -> None:
        assert self.channel is not None
        assert self.payload is not None
        self.channel.send({**message, "inline": True, "nbytes": len(self.payload)})

    def pieces(self, message: dict[str, Any], payload: bytes) -> None:
        assert self.channel is not None
        for start in range(0, len(payload), PIECE_BYTES):
            piece = payload[start : start + PIECE_BYTES]
            about = {"op": "piece", "id": message["id"], "nbytes": len(piece)}
            self.channel.send(about, lambda fd, piece=piece: write_all(fd, memoryview(piece)))
            for notice in self.between:
                self.channel.send(notice)

    def connect(self) -> AgentLink:
        return AgentLink(Channel.to_agent(self.name, SECRET))


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.listener.close()


def test_there_is_no_link_without_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETION_AGENT", raising=False)
    assert AgentLink.connect() is None


def test_the_agent_is_found_through_the_environment(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETION_AGENT", agent.name)
    monkeypatch.setenv("MOETION_SECRET", SECRET.hex())
    link = AgentLink.connect()
    assert link is not None
    assert link.request({"op": "hello"})["op"] == "hello"
    link.close()
    link.close()


def test_a_wrong_secret_is_refused(agent: Agent) -> None:
    with pytest.raises(AuthenticationError):
        Channel.to_agent(agent.name, b"wrong")


def test_replies_go_to_their_requests_from_many_threads(agent: Agent) -> None:
    link = agent.connect()
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: link.request({"op": "echo", "n": n}), range(200)))
    assert [reply["n"] for reply in replies] == list(range(200))
    link.close()


def test_notices_that_came_before_anybody_listened_are_delivered_first_and_in_order(
    agent: Agent,
) -> None:
    link = agent.connect()
    agent.before = [{"op": "freeze", "epoch": 1}, {"op": "verdict", "epoch": 1}]
    link.request({"op": "echo"})
    agent.before = [{"op": "abort", "epoch": 1}]
    seen: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    link.listen(seen.put)
    link.request({"op": "echo"})
    assert [seen.get(timeout=10)["op"] for _ in range(3)] == ["freeze", "verdict", "abort"]
    link.close()


def test_a_ping_is_answered_before_anybody_listens(agent: Agent) -> None:
    link = agent.connect()
    agent.accepted.wait()
    assert agent.channel is not None
    agent.channel.send({"op": "ping", "number": 3})
    assert agent.got.get(timeout=30) == {"op": "pong", "number": 3}
    link.close()


def test_bytes_follow_a_reply(agent: Agent) -> None:
    link = agent.connect()
    agent.payload = os.urandom(10 * PIECE_BYTES + 1)
    reply, payload = link.request_payload({"op": "fetch"})
    assert payload == agent.payload
    assert link.request_payload({"op": "fetch", "n": 2})[0]["n"] == 2
    assert reply["nbytes"] == len(agent.payload)
    agent.payload = b""
    assert link.request_payload({"op": "fetch"})[1] == b""
    link.close()


def test_notices_come_between_the_pieces_of_a_reply(agent: Agent) -> None:
    link = agent.connect()
    seen: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    link.listen(seen.put)
    agent.payload, agent.between = os.urandom(3 * PIECE_BYTES), [{"op": "freeze"}]
    assert link.request_payload({"op": "fetch"})[1] == agent.payload
    assert [seen.get(timeout=10)["op"] for _ in range(3)] == ["freeze"] * 3
    link.close()


def test_another_answer_follows_one_that_broke_off(agent: Agent) -> None:
    link = agent.connect()
    agent.payload, agent.breaks = os.urandom(10 * PIECE_BYTES), 2
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda n: link.request_payload({"op": "fetch", "n": n}), range(20))
        assert [(reply["n"], payload) for reply, payload in found] == [
            (n, agent.payload) for n in range(20)
        ]
    link.close()


def test_what_cannot_be_asked_for_is_an_error_of_its_own(agent: Agent) -> None:
    link = agent.connect()
    agent.answer = lambda message: agent.channel.send(  # type: ignore[method-assign,union-attr]
        {"op": "unreachable", "id": message["id"], "reason": "node 3 is gone"}
    )
    with pytest.raises(Unreachable, match="node 3 is gone"):
        link.request({"op": "fetch"})
    link.close()


def test_a_request_inside_a_notice_is_an_error_and_not_a_deadlock(agent: Agent) -> None:
    link = agent.connect()
    errors: queue.SimpleQueue[RuntimeError] = queue.SimpleQueue()

    def ask(_: dict[str, Any]) -> None:
        try:
            link.request({"op": "echo"})
        except RuntimeError as error:
            errors.put(error)

    link.listen(ask)
    agent.before = [{"op": "freeze"}]
    link.request({"op": "echo"})
    assert "inside a notice" in str(errors.get(timeout=10))
    link.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_no_link(agent: Agent) -> None:
    link = agent.connect()
    pid = os.fork()
    if pid == 0:
        try:
            link.send({"op": "x"})
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert link.request({"op": "echo"})["op"] == "echo"
    link.close()


CLIENT = """
import os, sys, threading
from megatron_moetion.agent.link import AgentLink
link = AgentLink.connect(on_notice=lambda notice: 1 / 0)
print("up", flush=True)
threading.Event().wait()
"""


def run_client(agent: Agent) -> subprocess.Popen[str]:
    env = {**os.environ, "MOETION_AGENT": agent.name, "MOETION_SECRET": SECRET.hex(), "RANK": "5"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", CLIENT]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
    assert agent.accepted.wait(60)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_a_worker_ends_when_its_agent_does(agent: Agent) -> None:
    process = run_client(agent)
    assert agent.channel is not None
    agent.channel.stop_reading()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == ORPHAN_EXIT_CODE
    assert errors == "moetion: rank 5: the node agent is gone; this worker ends\n"


def test_a_worker_ends_when_a_notice_cannot_be_handled(agent: Agent) -> None:
    process = run_client(agent)
    assert agent.channel is not None
    agent.channel.send({"op": "freeze"})
    _, errors = process.communicate(timeout=60)
    assert process.returncode == ORPHAN_EXIT_CODE
    assert "ZeroDivisionError" in errors
