"""Serves the connections of local workers and of other agents, one thread each.

What concerns the vault is answered here; everything else is posted to the main loop, in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import Any

from megatron_moetion.agent.membership import Members
from megatron_moetion.agent.peers import Peers
from megatron_moetion.agent.wire import Channel, Message, send_file_region
from megatron_moetion.vault.budget import Claim, free_bytes, refusal, table
from megatron_moetion.vault.entry import Entry
from megatron_moetion.vault.spill import Span
from megatron_moetion.vault.store import VaultStore


@dataclass(frozen=True)
class FromWorker:
    """A message of a local worker."""

    global_rank: int
    message: Message


@dataclass(frozen=True)
class WorkerSilent:
    """Everything that a local worker had sent before it closed has been posted."""

    global_rank: int


@dataclass(frozen=True)
class FromPeer:
    """A message over the control connection of another node."""

    node_rank: int
    message: Message


@dataclass(frozen=True)
class PeerJoined:
    """Another node's agent has connected to this one, the leader."""

    node_rank: int
    channel: Channel


@dataclass(frozen=True)
class PeerGone:
    """A control connection ended."""

    node_rank: int
    why: str


Item = FromWorker | WorkerSilent | FromPeer | PeerJoined | PeerGone


class Desk:
    """All connections that others open to this agent.

    Args:
        members: all nodes; `members.own` is this one.
        store: this node's vault.
        peers: how to reach other nodes' vaults.
        secret: the job's.
        welcome: what to tell a worker that says hello.
        post: hands an item to the main loop; called from many threads.
    """

    def __init__(
        self,
        members: Members,
        store: VaultStore,
        peers: Peers,
        secret: bytes,
        welcome: Callable[[int], Message],
        post: Callable[[Item], None],
    ) -> None:
        self._members = members
        self._store = store
        self._peers = peers
        self._secret = secret
        self._welcome = welcome
        self._post = post
        self._lock = threading.Lock()
        self._workers: dict[int, Channel] = {}
        self._early: dict[int, list[Message]] = {}
        self._positions: dict[int, dict[str, Any]] = {}
        self._claims: dict[int, Claim] = {}
        self._claimants: list[tuple[Channel, int]] = []

    def open(self, listener: Listener) -> None:
        """Accept connections for as long as the process lives."""
        thread = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        thread.start()

    def notify(self, global_rank: int, message: Message) -> None:
        """Send a notice to a local worker, as soon as it has connected."""
        with self._lock:
            channel = self._workers.get(global_rank)
            if channel is None:
                self._early.setdefault(global_rank, []).append(message)
                return
        try:
            channel.send(message)
        except OSError:
            # Its exit is about to be seen, and that is what the job acts on.
            return

    def position(self, global_rank: int) -> dict[str, Any] | None:
        """Newest position of a local rank, whichever process sent it."""
        with self._lock:
            return self._positions.get(global_rank)

    def place(self, positions: dict[int, dict[str, Any]]) -> None:
        """Positions of local ranks whose workers are gone since before this process began."""
        with self._lock:
            self._positions.update(positions)

    def hush(self, global_rank: int) -> bool:
        """A worker has died: drain what it sent, then post `WorkerSilent`.

        Returns:
            False when it has no connection: all that it ever sent has been posted.
        """
        with self._lock:
            self._early.pop(global_rank, None)
            channel = self._workers.get(global_rank)
            if channel is None:
                return False
            channel.stop_reading()
            return True

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection = listener.accept()
            except OSError as error:
                print(f"moetion-run: accepting a connection failed: {error}", file=sys.stderr)
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            channel = Channel.accepted(connection, self._secret)
            first = channel.receive()
        except (AuthenticationError, ValueError) as error:
            print(f"moetion-run: refused a connection: {error}", file=sys.stderr)
            connection.close()
            return
        except (EOFError, OSError):
            # It went away before it said who it was, like a worker that dies while it starts.
            connection.close()
            return
        match first["op"]:
            case "hello" if first["global_rank"] in self._members.own.global_ranks:
                self._serve_worker(first["global_rank"], channel, first)
            case "control":
                self._post(PeerJoined(first["node_rank"], channel))
                self.follow(first["node_rank"], channel)
            case "vault":
                self._serve_vault(channel)
            case _:
                print(f"moetion-run: refused {first['op']!r} of a stranger", file=sys.stderr)
        channel.close()

    def follow(self, node_rank: int, channel: Channel) -> None:
        """Post what another agent says until its connection ends; runs in the caller's thread."""
        try:
            while True:
                self._post(FromPeer(node_rank, channel.receive()))
        except (EOFError, OSError) as error:
            self._post(PeerGone(node_rank, str(error) or "connection closed"))

    def _serve_worker(self, rank: int, channel: Channel, hello: Message) -> None:
        with self._lock:
            claimed = {"claimed": rank in self._claims}
            with contextlib.suppress(ConnectionError):
                channel.send({**self._welcome(rank), **claimed, "id": hello["id"]})
                for notice in self._early.pop(rank, []):
                    channel.send(notice)
            self._workers[rank] = channel
        self._post(FromWorker(rank, hello))
        try:
            while True:
                self._handle(rank, channel, channel.receive())
        except (EOFError, OSError):
            pass
        finally:
            with self._lock:
                if self._workers.get(rank) is channel:
                    del self._workers[rank]
                # Inside the lock: once `hush` finds no connection, this has been posted.
                self._post(WorkerSilent(rank))

    def _handle(self, rank: int, channel: Channel, message: Message) -> None:
        try:
            match message["op"]:
                case "entry":
                    fields = [field.name for field in dataclasses.fields(Entry)]
                    self._store.publish(rank, Entry(**{name: message[name] for name in fields}))
                case "drop":
                    self._store.drop(rank, message["below"])
                case "window":
                    # In order with the worker's drops, none of which may come first.
                    if message["kept"]:
                        self._store.pin(rank, Span(**message["span"]).iterations)
                    self._post(FromWorker(rank, message))
                case "position":
                    with self._lock:
                        self._positions[rank] = message["position"]
                case "chunk":
                    chunk = self._store.new_chunk(rank, message["nbytes"])
                    reply = {"chunk": chunk.number, "path": chunk.path, "nbytes": chunk.nbytes}
                    channel.send({"op": "chunk", "id": message["id"], **reply})
                case "claim":
                    self._claim(rank, channel, message)
                case "fetch":
                    self._fetch(channel, message)
                case "inventory":
                    self._inventory(channel, message)
                case _:
                    self._post(FromWorker(rank, message))
        except ConnectionError:
            # The worker is gone before it got its reply; what it sent after its request still
            # counts.
            return
        except (KeyError, ValueError, OSError) as error:
            reason = f"bad message {message['op']!r} of rank {rank}: {error}"
            if "id" in message:
                channel.send({"op": "refused", "id": message["id"], "reason": reason})
            else:
                self._post(FromWorker(rank, {"op": "hopeless", "reason": reason}))

    def _claim(self, rank: int, channel: Channel, message: Message) -> None:
        """Hold every rank's answer back until all have asked and the node can tell."""
        with self._lock:
            self._claims[rank] = Claim.from_json(message)
            self._claimants.append((channel, message["id"]))
            if self._claims.keys() < set(self._members.own.global_ranks):
                return
        limit = message["limit"]
        # What the vault holds already, after a cold start, is part of the claim.
        available = free_bytes() + self._store.allocated_bytes() if limit is None else limit
        reason = refusal(self._claims, available)
        if reason is not None:
            reason = f"node {self._members.own.node_rank}: {reason}"
            self._post(FromWorker(rank, {"op": "hopeless", "reason": reason}))
            return
        if self._members.own.node_rank == 0:
            needs = {global_rank: claim.need for global_rank, claim in self._claims.items()}
            for line in table(needs, available).splitlines():
                print(f"moetion-run: {line}", file=sys.stderr)
        for claimant, request_id in self._claimants:
            # One that has died meanwhile is about to be seen, and its replacement need not ask.
            with contextlib.suppress(OSError):
                claimant.send({"op": "granted", "id": request_id})

    def _fetch(self, channel: Channel, message: Message) -> None:
        owner, request_id = message["global_rank"], message["id"]
        node_rank = self._members.node_of(owner)
        if node_rank != self._members.own.node_rank:
            self._peers.fetch(node_rank, owner, message["key"], channel, request_id)
            return
        found = self._store.find(owner, message["key"])
        if found is None:
            channel.send({"op": "missing", "id": request_id})
            return
        entry, chunk = found
        place = {"path": chunk.path, "offset": entry.offset}
        channel.send({"op": "found", "id": request_id, **place, **describe(entry)})

    def _inventory(self, channel: Channel, message: Message) -> None:
        owner, prefix = message["global_rank"], message["prefix"]
        node_rank = self._members.node_of(owner)
        if node_rank != self._members.own.node_rank:
            entries = self._peers.inventory(node_rank, owner, prefix)
        else:
            entries = self.listings(owner, prefix)
        channel.send({"op": "inventory", "id": message["id"], "entries": entries})

    def listings(self, global_rank: int, prefix: str) -> list[Message]:
        """Inventory of a local rank as JSON."""
        return [dataclasses.asdict(item) for item in self._store.inventory(global_rank, prefix)]

    def _serve_vault(self, channel: Channel) -> None:
        try:
            while True:
                message = channel.receive()
                if message["op"] == "inventory":
                    entries = self.listings(message["global_rank"], message["prefix"])
                    channel.send({"op": "inventory", "entries": entries})
                else:
                    self._send_entry(channel, message["global_rank"], message["key"])
        except (EOFError, OSError):
            # The control connection tells that an agent is gone; this one carries only bytes.
            return

    def _send_entry(self, channel: Channel, global_rank: int, key: str) -> None:
        found = self._store.find(global_rank, key)
        if found is None:
            channel.send({"op": "missing"})
            return
        entry, chunk = found

        def send_bytes(fd: int) -> None:
            send_file_region(fd, chunk.fd, entry.offset, entry.nbytes)

        channel.send({"op": "found", **describe(entry)}, send_bytes)


def describe(entry: Entry) -> Message:
    """What a reader needs to know of an entry besides where it lies."""
    return {"nbytes": entry.nbytes, "checksum": entry.checksum, "meta": entry.meta}
