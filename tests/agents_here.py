"""The agents of several nodes in this process: desks, gates and vaults, without any workers."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from megatron_moetion.agent.desk import Desk
from megatron_moetion.agent.equipment import assemble
from megatron_moetion.agent.gate import Gate
from megatron_moetion.agent.items import Damaged, FromWorker, Item, Replicated
from megatron_moetion.agent.link import AgentLink
from megatron_moetion.agent.membership import BACKLOG, Member, Members
from megatron_moetion.agent.shelf import agent_vault
from megatron_moetion.agent.wire import Channel, listen_tcp, listen_unix
from megatron_moetion.events import EventLog
from megatron_moetion.faults import Fault
from megatron_moetion.vault import Vault
from megatron_moetion.vault.budget import Claim, Need
from megatron_moetion.vault.placement import place
from megatron_moetion.vault.store import VaultStore

SECRET = b"contract"
WAIT_SECONDS = 60


class AgentsHere:
    """One agent per node, one rank on each; closed at the end of the test.

    Args:
        num_nodes: each in a failure domain of its own.
        num_copies: of each frame.
        faults: scripted damage of copies.
        patience: of the gates.
        directory: for events.
        started: copying begins at once and not with `start`.
    """

    def __init__(
        self,
        num_nodes: int,
        num_copies: int = 0,
        faults: Sequence[Fault] = (),
        patience: timedelta = timedelta(seconds=30),
        directory: Path | None = None,
        started: bool = True,
    ) -> None:
        listeners = [listen_tcp("127.0.0.1", BACKLOG) for _ in range(num_nodes)]
        ports = [listener.getsockname()[1] for listener in listeners]
        nodes = tuple(Member(n, "127.0.0.1", port, 1, n) for n, port in enumerate(ports))
        placement = place([str(node) for node in range(num_nodes)], num_copies)
        self.ports = ports
        self.token = secrets.token_hex(4)
        self.links: list[AgentLink] = []
        self._changed = threading.Condition()
        self.damaged: list[tuple[int, Damaged]] = []
        self.replicated: list[Replicated] = []
        self.granted: list[int] = []
        self.refused: list[tuple[int, str]] = []
        self.logs = [EventLog(directory, f"agent-{node}") for node in range(num_nodes)]
        self.equipment = []
        self.desks: list[Desk] = []
        for node_rank, listener in enumerate(listeners):
            members = Members(nodes, node_rank)
            log = self.logs[node_rank]
            post = lambda item, node=node_rank: self._post(node, item)  # noqa: E731
            equipment = assemble(members, VaultStore(), placement, SECRET, faults, (), log, post)
            self.equipment.append(equipment)
            desk = Desk(members, equipment, lambda rank, hello: {"op": "welcome"}, post)
            self.desks.append(desk)
            for door in (listener, listen_unix(self.name(node_rank), 16)):
                Gate(door, SECRET, desk.serve, patience, equipment.counters, log).open()
        self.stores = [equipment.store for equipment in self.equipment]
        if started:
            self.start()

    def start(self) -> None:
        """Begin to copy."""
        for equipment in self.equipment:
            equipment.replication.start()

    def name(self, node_rank: int) -> str:
        return f"@moetion-here-{self.token}-{node_rank}"

    def link(self, global_rank: int) -> AgentLink:
        link = AgentLink(Channel.to_agent(self.name(global_rank), SECRET))
        self.links.append(link)
        link.request({"op": "hello", "global_rank": global_rank})
        return link

    def vault(self, global_rank: int) -> Vault:
        return agent_vault(self.link(global_rank), global_rank)

    def channel(self, node_rank: int) -> Channel:
        return Channel.to_peer("127.0.0.1", self.ports[node_rank], SECRET)

    def claim(
        self, global_rank: int, nbytes: int, limit: int | None = 1 << 30, lag: int = 1
    ) -> None:
        """What a worker asks for before it starts, in a thread, as it may have to wait for others;
        see `await_granted`.
        """
        link = self.link(global_rank)
        claim = Claim(Need(0, nbytes, 0), {}).to_json()

        def ask() -> None:
            link.request({"op": "claim", "limit": limit, "lag": lag, **claim})
            with self._changed:
                self.granted.append(global_rank)
                self._changed.notify_all()

        threading.Thread(target=ask, daemon=True).start()

    def await_granted(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.granted) >= number, WAIT_SECONDS)

    def await_refused(self, number: int) -> list[tuple[int, str]]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.refused) >= number, WAIT_SECONDS)
            return list(self.refused)

    def count(self, node_rank: int, name: str) -> int:
        return self.equipment[node_rank].counters.numbers().get(name, 0)

    def await_count(self, node_rank: int, name: str, number: int) -> None:
        counters = self.equipment[node_rank].counters
        assert counters.wait_for(name, number, WAIT_SECONDS), counters.numbers()

    def _post(self, node_rank: int, item: Item) -> None:
        with self._changed:
            if isinstance(item, Damaged):
                self.damaged.append((node_rank, item))
            elif isinstance(item, Replicated):
                self.replicated.append(item)
            elif isinstance(item, FromWorker) and item.message["op"] == "hopeless":
                self.refused.append((node_rank, item.message["reason"]))
            self._changed.notify_all()

    def await_damaged(self, number: int) -> list[tuple[int, Damaged]]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.damaged) >= number, WAIT_SECONDS)
            return list(self.damaged)

    def await_replicated(self, number: int) -> list[Replicated]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.replicated) >= number, WAIT_SECONDS)
            return list(self.replicated)

    def close(self) -> None:
        for link in self.links:
            link.close()
        for store in self.stores:
            store.close()
        for log in self.logs:
            log.close()
