"""Serves the connections of local workers and of other agents, one thread each.

What concerns the vault is answered here; everything else is posted to the main loop, in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_moetion.agent.equipment import Equipment
from megatron_moetion.agent.items import (
    Damaged,
    FromPeer,
    FromWorker,
    Item,
    PeerGone,
    PeerJoined,
    WorkerSilent,
)
from megatron_moetion.agent.lease import bulk
from megatron_moetion.agent.membership import Members
from megatron_moetion.agent.outbox import Outbox
from megatron_moetion.agent.wire import Channel, Message, send_file_region
from megatron_moetion.vault.entry import Entry, split_key
from megatron_moetion.vault.shelf import Unreachable
from megatron_moetion.vault.spill import Span


class Desk:
    """All connections that others open to this agent.

    Args:
        members: all nodes; `members.own` is this one.
        equipment: what the connections are about.
        welcome: what to tell a worker, from its global rank and its hello; may wait.
        post: hands an item to the main loop; called from many threads.
        lease: of every agent.
        beats: answers the beats of another agent, see `lease.Leases.serve`; None where no other
            agent has any business.
    """

    def __init__(
        self,
        members: Members,
        equipment: Equipment,
        welcome: Callable[[int, Message], Message],
        post: Callable[[Item], None],
        lease: timedelta | None = None,
        beats: Callable[[Channel, str], None] | None = None,
    ) -> None:
        self._lease, self._beats = lease, beats
        self._members = members
        self._equipment = equipment
        self._store = equipment.store
        self._welcome = welcome
        self._post = post
        self._lock = threading.Lock()
        self._workers: dict[int, Outbox] = {}
        self._early: dict[int, list[Message]] = {}
        self._positions: dict[int, dict[str, Any]] = {}

    def notify(self, global_rank: int, message: Message) -> None:
        """Send a notice to a local worker, as soon as it has connected; returns at once."""
        with self._lock:
            outbox = self._workers.get(global_rank)
            if outbox is None:
                self._early.setdefault(global_rank, []).append(message)
            else:
                outbox.post(message)

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
            outbox = self._workers.get(global_rank)
            if outbox is None:
                return False
            outbox.channel.stop_reading()
            return True

    def serve(self, channel: Channel, first: Message) -> None:
        """Serve a connection that was let in until it ends; runs in a thread of its own."""
        try:
            self._serve(channel, first)
        except (KeyError, ValueError) as error:
            line = f"ended a connection that sent what it must not: {error!r}"
            print(f"moetion-run: {line}", file=sys.stderr)
        finally:
            channel.close()

    def _serve(self, channel: Channel, first: Message) -> None:
        match first["op"]:
            case "hello" if first["global_rank"] in self._members.own.global_ranks:
                self._serve_worker(first["global_rank"], channel, first)
            case "control" | "standby" if self._beats is not None:
                self._end_when_silent(channel, self._lease)
                member = first.get("member")
                self._post(PeerJoined(channel, first["agent"], first["node_rank"], member))
                self.follow(channel)
            case "pulse" if self._beats is not None:
                self._end_when_silent(channel, self._lease)
                self._beats(channel, first["agent"])
            case "vault":
                self._end_when_silent(channel, bulk(self._lease))
                self._serve_vault(channel)
            case "copies":
                self._end_when_silent(channel, bulk(self._lease))
                self._equipment.copies.serve(channel, first["node_rank"], first["tenure"])
            case other:
                raise ValueError(f"{other!r} as first message")

    @staticmethod
    def _end_when_silent(channel: Channel, silence: timedelta | None) -> None:
        if silence is not None:
            channel.end_when_silent(silence)

    def follow(self, channel: Channel) -> None:
        """Post what another agent says until its connection ends; runs in the caller's thread."""
        try:
            while True:
                self._post(FromPeer(channel.receive(), channel))
        except (EOFError, OSError) as error:
            self._post(PeerGone(str(error) or "connection closed", channel))

    def _serve_worker(self, rank: int, channel: Channel, hello: Message) -> None:
        welcome = self._welcome(rank, hello)
        with self._lock:
            claims = self._equipment.claims
            claimed = {"claimed": claims.asked(rank), "ceiling": claims.ceiling}
            with contextlib.suppress(ConnectionError):
                # Nothing waits in the socket yet, so this does not.
                channel.send({**welcome, **claimed, "id": hello["id"]})
            outbox = self._workers[rank] = Outbox(channel, self._early.pop(rank, []))
        self._post(FromWorker(rank, hello))
        try:
            while True:
                self._handle(rank, channel, channel.receive())
        except (EOFError, OSError):
            pass
        finally:
            with self._lock:
                if self._workers.get(rank) is outbox:
                    del self._workers[rank]
                # Inside the lock: once `hush` finds no connection, this has been posted.
                self._post(WorkerSilent(rank))
            outbox.close()

    def _handle(self, rank: int, channel: Channel, message: Message) -> None:
        try:
            match message["op"]:
                case "entry":
                    fields = [field.name for field in dataclasses.fields(Entry)]
                    entry = Entry(**{name: message[name] for name in fields})
                    self._store.publish(rank, entry)
                    self._count(entry)
                    self._equipment.replication.sealed(rank, entry)
                case "drop":
                    self._store.drop(rank, message["below"])
                    self._equipment.replication.dropped(rank, message["below"])
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
                case "discard":
                    self._store.discard(rank, message["chunk"])
                case "claim":
                    self._equipment.claims.take(rank, channel, message)
                case "measure":
                    rate = self._equipment.replication.measure()
                    reply = {"id": message["id"], "bytes_per_second": rate}
                    channel.send({"op": "measured", **reply})
                case "fetch":
                    self._fetch(channel, message)
                case "quarantine":
                    self._have_quarantined(channel, message)
                case "inventory":
                    self._inventory(channel, message)
                case _:
                    self._post(FromWorker(rank, message))
        except Unreachable as gone:
            reply = {"op": "unreachable", "id": message["id"], "reason": str(gone)}
            with contextlib.suppress(ConnectionError):
                channel.send(reply)
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

    def _count(self, entry: Entry) -> None:
        counters, kind = self._equipment.counters, split_key(entry.key)[0]
        what = "captured" if kind == "frame" else "logged"
        if kind == "boundary":
            counters.add("boundary entries")
        counters.add(f"{what} entries")
        counters.add(f"{what} bytes", entry.nbytes)
        counters.reach(f"largest {what} entry", entry.nbytes)

    def _fetch(self, channel: Channel, message: Message) -> None:
        """Answer with the nearest copy: this node's, the owner's, then that of each holder."""
        owner, key, request_id = message["global_rank"], message["key"], message["id"]
        found = self._store.find(owner, key)
        if found is not None:
            entry, chunk = found
            place = {"path": chunk.path, "offset": entry.offset}
            reply = {"op": "found", "id": request_id, "node_rank": self._members.own_node_rank}
            channel.send({**reply, **place, **describe(entry)})
            return
        home = self._members.node_of(owner)
        kept = (home, *self._equipment.placement.holders[home])
        unreachable: Unreachable | None = None
        for node_rank in [node for node in kept if node != self._members.own_node_rank]:
            try:
                if self._equipment.peers.fetch(node_rank, owner, key, channel, request_id):
                    return
            except Unreachable as gone:
                # Another one may have it.
                unreachable = gone
        if unreachable is not None:
            raise Unreachable(f"{key} of rank {owner}: {unreachable}")
        channel.send({"op": "missing", "id": request_id})

    def _have_quarantined(self, channel: Channel, message: Message) -> None:
        node_rank = message["node_rank"]
        about = {name: message[name] for name in ("global_rank", "key", "checksum", "distrusted")}
        if node_rank == self._members.own_node_rank:
            reason = self._quarantine(**about)
        else:
            try:
                reason = self._equipment.peers.quarantine(node_rank, about)
            except Unreachable:
                # And the copy with it.
                reason = None
        channel.send({"op": "read", "id": message["id"], "reason": reason})

    def _quarantine(
        self, global_rank: int, key: str, checksum: str, distrusted: str | None
    ) -> str | None:
        reason = self._store.quarantine(global_rank, key, checksum, distrusted)
        if reason:
            home = self._members.node_of(global_rank)
            copy = self._equipment.placement.copy_number(home, self._members.own_node_rank)
            self._post(Damaged(global_rank, key, copy or 0, reason))
        return reason

    def _inventory(self, channel: Channel, message: Message) -> None:
        owner, prefix = message["global_rank"], message["prefix"]
        node_rank = self._members.node_of(owner)
        if node_rank != self._members.own.node_rank:
            entries = self._equipment.peers.inventory(node_rank, owner, prefix)
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
                elif message["op"] == "quarantine":
                    reason = self._quarantine(**message["about"])
                    channel.send({"op": "read", "reason": reason})
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
    return {
        "nbytes": entry.nbytes,
        "checksum": entry.checksum,
        "meta": entry.meta,
        "parts": entry.parts,
    }
