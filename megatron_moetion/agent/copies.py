"""The holder's side of replication: other nodes' frames, received, checked, kept, handed out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_moetion.agent.counters import Counters
from megatron_moetion.agent.membership import Members
from megatron_moetion.agent.wire import Channel, Message
from megatron_moetion.faults import Scripted
from megatron_moetion.vault.arena import map_shared
from megatron_moetion.vault.budget import Claim
from megatron_moetion.vault.entry import Entry, damage, split_key
from megatron_moetion.vault.placement import Placement
from megatron_moetion.vault.store import VaultStore

DRAIN_BYTES = 1 << 20


class _Fenced(Exception):
    """What an agent sends does not count any more: another one has its place."""


@dataclass(frozen=True)
class _Sender:
    """Whose copies a connection brings, and which copy of its frames is held here."""

    node_rank: int
    tenure: int
    copy: int


class Copies:
    """Serves the replication streams of other nodes.

    Args:
        members: all nodes.
        placement: says which copies are expected here.
        store: this node's vault.
        counters: frames held, and those that arrived damaged.
        faults: scripted damage of copies, in flight and stored.
        claimed: told when another node has said what its ranks' copies come to.
    """

    def __init__(
        self,
        members: Members,
        placement: Placement,
        store: VaultStore,
        counters: Counters,
        faults: Scripted,
        claimed: Callable[[], None],
    ) -> None:
        self._members, self._placement, self._store = members, placement, store
        self._counters, self._faults, self._claimed = counters, faults, claimed
        self._lock = threading.Lock()
        self._claims: dict[int, Claim] = {}
        self._ceiling = 0
        self._tenure = {node.node_rank: node.tenure for node in members.nodes}
        # Held while anything of a node's is changed: a fence that is up has nothing behind it.
        self._fences = {node.node_rank: threading.Lock() for node in members.nodes}
        self._channels: dict[int, list[Channel]] = {}

    def known(self) -> bool:
        """Whether every owner has said what its copies come to."""
        with self._lock:
            return all(rank in self._claims for rank in self._owned())

    def expected(self, ceiling: int) -> int:
        """Bytes of all copies that will be held here; only when that is `known`.

        Args:
            ceiling: how long windows may become, see `budget.Claim`; one that an owner does not ask
                for is 0 to it.
        """
        with self._lock:
            return sum(self._limit(self._claims[rank], ceiling) for rank in self._owned())

    def allow(self, ceiling: int) -> None:
        """From now on copies may take what they need with windows that become as long as that."""
        with self._lock:
            self._ceiling = ceiling

    @staticmethod
    def _limit(claim: Claim, ceiling: int) -> int:
        return claim.with_ceiling(ceiling if ceiling in claim.ceilings else 0).need.copies

    def _owned(self) -> list[int]:
        owners = self._placement.held_by(self._members.own_node_rank)
        return [rank for node in owners for rank in self._members.nodes[node].global_ranks]

    def fence(self, node_rank: int, tenure: int) -> None:
        """From now on nothing counts of agents that had a node's place before this tenure."""
        with self._fences[node_rank]:
            if tenure <= self._tenure[node_rank]:
                return
            self._tenure[node_rank] = tenure
            for channel in self._channels.pop(node_rank, []):
                channel.cut()

    def serve(self, channel: Channel, node_rank: int, tenure: int) -> None:
        """Take what another node sends until it is gone, or its place is given away.

        Args:
            tenure: of whoever sends; see `membership.Member`.

        Raises:
            ValueError, KeyError: it sends what it must not.
        """
        copy = self._placement.copy_number(node_rank, self._members.own_node_rank)
        if not copy:
            raise ValueError(f"node {node_rank} has no copies here")
        # It may come before the leader's word that it has the place now.
        self.fence(node_rank, tenure)
        sender = _Sender(node_rank, tenure, copy)
        try:
            with self._of(sender):
                self._channels.setdefault(node_rank, []).append(channel)
            while True:
                self._take(channel, sender, channel.receive())
        except _Fenced:
            self._counters.add("messages of agents that had lost their place")
        except (EOFError, OSError):
            # The control connection tells that an agent is gone; this one carries only copies.
            return

    @contextmanager
    def _of(self, sender: _Sender) -> Iterator[None]:
        """Hold the fence while something that a sender says is carried out.

        Raises:
            _Fenced: it has lost its place.
        """
        with self._fences[sender.node_rank]:
            if sender.tenure < self._tenure[sender.node_rank]:
                raise _Fenced
            yield

    def _take(self, channel: Channel, sender: _Sender, message: Message) -> None:
        ranks = self._members.nodes[sender.node_rank].global_ranks
        if message["op"] == "claims":
            with self._of(sender):
                self._claim(message, ranks)
            channel.send({"op": "heard"})
            self._claimed()
        elif message["op"] == "probe":
            _drain(channel, message["nbytes"])
            channel.send({"op": "heard"})
        elif message["global_rank"] not in ranks:
            raise ValueError(f"rank {message['global_rank']} is not of node {sender.node_rank}")
        elif message["op"] == "copy":
            channel.send({"op": self._receive(channel, message, sender)})
        else:
            with self._of(sender):
                if message["op"] == "drop":
                    self._store.drop(message["global_rank"], message["below"])
                else:
                    self._store.forget(message["global_rank"], message["key"])

    def _claim(self, message: Message, ranks: tuple[int, ...]) -> None:
        claims = {int(rank): Claim.from_json(claim) for rank, claim in message["claims"].items()}
        with self._lock:
            self._claims.update({rank: claims[rank] for rank in ranks})

    def _receive(self, channel: Channel, message: Message, sender: _Sender) -> str:
        """Take the bytes of one frame; returns what to answer."""
        rank, key, nbytes = message["global_rank"], message["key"], message["nbytes"]
        copy = sender.copy
        kind, iteration = split_key(key)
        with self._lock:
            claim = self._claims.get(rank)
            limit = 0 if claim is None else self._limit(claim, self._ceiling)
        chunk = self._store.chunk_for_copy(rank, nbytes, limit)
        if chunk is None:
            _drain(channel, nbytes)
            return "full"
        published = False
        try:
            data = map_shared(chunk.path, chunk.nbytes).numpy()[:nbytes]
            channel.receive_raw(memoryview(data))

            def flip() -> None:
                data[0] ^= 1

            if kind == "frame":
                self._faults.strike("transfer", rank, iteration, copy, flip)
            if damage(data, message["checksum"], message["parts"]) is not None:
                self._counters.add("frames that arrived damaged")
                return "damaged"
            fields = (message["checksum"], message["meta"], message["parts"])
            with self._of(sender):
                self._store.publish(rank, Entry(key, chunk.number, 0, nbytes, *fields))
                published = True
            if kind == "frame":
                self._faults.strike("stored", rank, iteration, copy, flip)
        finally:
            if not published:
                self._store.give_back(chunk)
        if kind == "frame":
            self._counters.add("frames held for others")
        return "stored"


def _drain(channel: Channel, nbytes: int) -> None:
    buffer = memoryview(bytearray(min(nbytes, DRAIN_BYTES)))
    while nbytes:
        piece = buffer[: min(nbytes, DRAIN_BYTES)]
        channel.receive_raw(piece)
        nbytes -= len(piece)
