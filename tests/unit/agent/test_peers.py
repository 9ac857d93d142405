"""Frames of other nodes: read from whoever is there, and never taken for missing."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_moetion.agent.link import AgentLink
from megatron_moetion.agent.membership import Member
from megatron_moetion.agent.peers import PIECE_BYTES
from megatron_moetion.agent.shelf import AgentShelf
from megatron_moetion.agent.wire import Channel
from megatron_moetion.vault.shelf import Unreachable
from tests.agents_here import SECRET, WAIT_SECONDS, AgentsHere

KEY = "frame/1/x"
LARGE = 8 * PIECE_BYTES


@pytest.fixture
def agents() -> Iterator[AgentsHere]:
    """Node 0 owns a frame, nodes 1 and 2 hold copies, and node 3 nothing."""
    agents = AgentsHere(4, 2)
    yield agents
    agents.close()


def seal(agents: AgentsHere, nbytes: int) -> bytes:
    """A frame of rank 0, copied; its bytes."""
    data = os.urandom(nbytes)
    for rank in range(4):
        agents.claim(rank, 4 * LARGE)
    agents.await_granted(4)
    agents.vault(0).put(KEY, torch.frombuffer(bytearray(data), dtype=torch.uint8), {})
    agents.await_replicated(1)
    return data


class Through:
    """Stands between node 3's agent and another one, and passes on what that sends, up to a limit.

    Args:
        nbytes: of what comes back; then the connection ends, or, if `waits`, nothing more comes
            until `close`. It is the only one.
    """

    def __init__(self, agents: AgentsHere, node_rank: int, nbytes: int, waits: bool = False):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port, self._left, self._waits = agents.ports[node_rank], nbytes, waits
        self.full, self._over = threading.Event(), threading.Event()
        here = Member(node_rank, "127.0.0.1", self._listener.getsockname()[1], 1, node_rank)
        agents.equipment[3].peers.moved(here)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._listener:
            near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._port))
        threading.Thread(target=self._forward, args=(near, far), daemon=True).start()
        with near, far:
            while self._left and (data := far.recv(min(1 << 16, self._left))):
                near.sendall(data)
                self._left -= len(data)
            self.full.set()
            if self._waits:
                self._over.wait()
            # Closing alone would wait for whoever reads from it here.
            near.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _forward(near: socket.socket, far: socket.socket) -> None:
        try:
            while data := near.recv(1 << 16):
                far.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self._over.set()


def test_where_the_owner_dies_in_the_middle_a_copy_is_read(agents: AgentsHere) -> None:
    data = seal(agents, LARGE)
    owner = Through(agents, 0, LARGE // 2)
    first = Through(agents, 1, LARGE // 2)
    found = agents.vault(3).fetch(0, KEY)
    assert owner.full.is_set()
    assert first.full.is_set()
    assert found is not None
    assert bytes(found.data.numpy()) == data


def test_what_nobody_can_be_asked_for_is_not_missing(agents: AgentsHere) -> None:
    seal(agents, LARGE)
    gone = [Through(agents, node, 0) for node in range(3)]
    vault = agents.vault(3)
    with pytest.raises(Unreachable, match=f"{KEY} of rank 0: node . is gone"):
        vault.fetch(0, KEY)
    with pytest.raises(Unreachable, match="node 0 is gone"):
        vault.inventory(0, "frame/")
    for each in gone:
        each.close()
    # The connection is good for more.
    assert vault.inventory(3, "frame/") == []


def test_what_others_hold_is_known_when_one_is_gone(agents: AgentsHere) -> None:
    data = seal(agents, 100)
    gone = Through(agents, 0, 0)
    found = agents.vault(3).fetch(0, KEY)
    gone.close()
    assert found is not None
    assert bytes(found.data.numpy()) == data


def test_a_copy_whose_node_is_gone_needs_no_quarantine(agents: AgentsHere) -> None:
    seal(agents, 100)
    shelf = AgentShelf(agents.link(3))
    found = shelf.find(0, KEY)
    assert found is not None
    assert found.node_rank == 0
    gone = Through(agents, 0, 0)
    assert shelf.quarantine(0, KEY, found) is None
    gone.close()


def test_a_notice_does_not_wait_for_a_node_that_has_become_silent(agents: AgentsHere) -> None:
    data = seal(agents, LARGE)
    silent = Through(agents, 0, LARGE // 2, waits=True)
    link = AgentLink(Channel.to_agent(agents.name(3), SECRET))
    agents.links.append(link)
    seen: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    link.listen(seen.put)
    link.request({"op": "hello", "global_rank": 3})
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
    asked = {"op": "fetch", "global_rank": 0, "key": KEY}
    threading.Thread(target=lambda: answer.put(link.request_payload(asked)), daemon=True).start()
    assert silent.full.wait(WAIT_SECONDS)
    at_once(lambda: agents.desks[3].notify(3, {"op": "freeze"}))
    assert seen.get(timeout=WAIT_SECONDS)["op"] == "freeze"
    assert answer.empty()
    silent.close()
    _, payload = answer.get(timeout=WAIT_SECONDS)
    assert payload == data


def at_once(call: Callable[[], object]) -> None:
    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(WAIT_SECONDS)
    assert not calling.is_alive(), "it waits for ever"


def flood(agents: AgentsHere) -> None:
    """More notices than a socket takes."""
    for number in range(100):
        agents.desks[3].notify(3, {"op": "filler", "number": number, "text": "x" * (1 << 14)})


def test_whoever_takes_nothing_in_holds_up_nobody(agents: AgentsHere) -> None:
    seal(agents, LARGE)
    worker = Channel.to_agent(agents.name(3), SECRET)
    worker.send({"op": "hello", "global_rank": 3, "id": 0})
    assert worker.receive()["op"] == "welcome"
    worker.send({"op": "fetch", "global_rank": 0, "key": KEY, "id": 1})
    assert worker.receive()["inline"]
    # A piece is on its way to it already.
    at_once(lambda: flood(agents))
    left = LARGE
    got: list[int] = []
    while len(got) < 100 or left:
        message = worker.receive()
        if message["op"] == "piece":
            worker.receive_raw(memoryview(bytearray(message["nbytes"])))
            left -= message["nbytes"]
        else:
            got.append(message["number"])
    assert got == list(range(100))
    worker.send({"op": "fetch", "global_rank": 0, "key": KEY, "id": 2})
    assert worker.receive()["inline"]
    at_once(lambda: flood(agents))
    at_once(lambda: agents.desks[3].hush(3))
    worker.close()
