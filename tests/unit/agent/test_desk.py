"""What a worker said before it died counts, all of it, and before its death."""

from __future__ import annotations

import queue
import secrets
import threading
from datetime import timedelta

from megatron_moetion.agent.desk import Desk
from megatron_moetion.agent.equipment import assemble
from megatron_moetion.agent.gate import Gate
from megatron_moetion.agent.items import FromWorker, Item, WorkerSilent
from megatron_moetion.agent.membership import Member, Members
from megatron_moetion.agent.wire import Channel, listen_unix
from megatron_moetion.events import EventLog
from megatron_moetion.vault.placement import place
from megatron_moetion.vault.store import VaultStore

SECRET = b"\x01\x02"
MEMBERS = Members((Member(0, "127.0.0.1", 0, 1),), 0)


class Agent:
    """A desk whose thread waits after the hello until it is let go."""

    def __init__(self) -> None:
        self.name = f"@moetion-test-{secrets.token_hex(4)}"
        self.posted: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self.go_on = threading.Event()
        log, placement = EventLog(None, "agent-0"), place(["here"], 0)
        equipment = assemble(MEMBERS, VaultStore(), placement, SECRET, (), (), log, self.post)
        self.desk = Desk(MEMBERS, equipment, lambda rank, hello: {"op": "welcome"}, self.post)
        door, patience = listen_unix(self.name, 1), timedelta(seconds=30)
        Gate(door, SECRET, self.desk.serve, patience, equipment.counters, log).open()

    def post(self, item: Item) -> None:
        self.posted.put(item)
        self.go_on.wait()

    def next(self) -> Item:
        return self.posted.get(timeout=30)

    def worker(self) -> Channel:
        channel = Channel.to_agent(self.name, SECRET)
        channel.send({"op": "hello", "global_rank": 0, "id": 0})
        assert channel.receive()["op"] == "welcome"
        assert isinstance(self.next(), FromWorker)
        return channel


def test_what_follows_a_request_counts_when_nobody_is_left_to_hear_the_reply() -> None:
    agent = Agent()
    worker = agent.worker()
    # More replies than fit in the socket's buffer would do as well; one to a closed one is enough.
    worker.send({"op": "inventory", "id": 1, "global_rank": 0, "prefix": "frame/"})
    worker.send({"op": "fired", "index": 7})
    worker.close()
    agent.go_on.set()
    assert agent.next() == FromWorker(0, {"op": "fired", "index": 7})
    assert agent.next() == WorkerSilent(0)


def test_once_a_connection_is_gone_all_of_it_has_been_posted() -> None:
    agent = Agent()
    worker = agent.worker()
    worker.send({"op": "fired", "index": 7})
    worker.close()
    agent.go_on.set()
    while agent.desk.hush(0):
        pass
    assert [agent.posted.get_nowait() for _ in range(2)] == [
        FromWorker(0, {"op": "fired", "index": 7}),
        WorkerSilent(0),
    ]
