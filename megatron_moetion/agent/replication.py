"""The owner's side of replication: sealed frames go to the nodes of the placement, in background.

A frame is durable once every node of its placement has acknowledged it. Training never waits for
that: see `Backlog.start_anew` for what happens when a network is too slow, and
`schedule.Schedule.lag_bound` for how far behind the copies may be.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing import AuthenticationError
from typing import Any

from megatron_moetion.agent.backlog import Backlog, Dropped, Forgotten, Item, Sealed
from megatron_moetion.agent.counters import Counters
from megatron_moetion.agent.lease import bulk
from megatron_moetion.agent.membership import Member, Members
from megatron_moetion.agent.wire import Channel, send_file_region, write_all
from megatron_moetion.events import EventLog
from megatron_moetion.faults import Scripted
from megatron_moetion.vault.arena import Chunk, map_shared
from megatron_moetion.vault.entry import Entry, split_key
from megatron_moetion.vault.placement import Placement
from megatron_moetion.vault.shelf import Unreachable
from megatron_moetion.vault.store import VaultStore

MAX_STREAMS = 4
"""Connections to one holder for frames; each rank's go over the same one, in order. Headers have
one more: what an iteration begins with must not wait until the frame before it is through.
"""
MAX_ATTEMPTS = 3
"""Of one transfer that arrives damaged."""
PROBE_BYTES = 16 << 20
"""What is sent to measure a network: 13 ms at 10 Gbit/s."""
SMALL = ("header", "interlude")
REPLICATED = ("frame", *SMALL)
"""Kinds of entries that are copied: what a rank needs to begin again on another node, when nothing
is replayed. Only frames are counted and measured; next to them a header is nothing.
"""

Quarantined = Callable[[int, str, int, str], None]
"""Told of a damaged copy on this node: (global rank, key, number of the copy, how)."""
Timed = Callable[[int, int, float], None]
"""Told how long a frame took: (global rank, bytes, seconds, see `items.Replicated`)."""


@dataclass
class _Rank:
    """How far the copies of a rank are.

    Attributes:
        sealed: its newest frame.
        durable: its newest durable frame; -1 is none.
        before: the iteration before its first frame; None before that.
        bound: see `Replication.bound`.
        behind: the copies are further behind than that.
        acknowledged: seconds that each copy took, by key of the frame and number of the copy.
    """

    sealed: int = -1
    durable: int = -1
    before: int | None = None
    bound: int | None = None
    behind: bool = False
    acknowledged: dict[str, dict[int, float]] = field(default_factory=dict)


class Replication:
    """Copies what local ranks seal.

    Args:
        members: all nodes.
        placement: where copies go.
        store: this node's vault.
        secret: the job's.
        counters: frames and bytes sent, skipped and sent again, and the lag.
        log: for events.
        faults: scripted damage of the owner's own copy.
        quarantined: told when a frame turns out to be damaged before it is sent.
        timed: told of every frame that has become durable.
        lease: of every agent.
    """

    def __init__(
        self,
        members: Members,
        placement: Placement,
        store: VaultStore,
        secret: bytes,
        counters: Counters,
        log: EventLog,
        faults: Scripted,
        quarantined: Quarantined,
        timed: Timed,
        lease: timedelta | None = None,
    ) -> None:
        self._store, self._counters, self._log = store, counters, log
        self._faults, self._quarantined, self._timed = faults, quarantined, timed
        self._first_rank = members.own.first_global_rank
        self._num_copies = placement.num_copies
        self._stopped = False
        self._lock = threading.Lock()
        self._ranks = {rank: _Rank() for rank in members.own.global_ranks}
        num_streams = min(MAX_STREAMS, members.own.num_workers)
        # Ranks that share a stream take turns in it.
        self._ranks_per_stream = members.own.num_workers / num_streams
        self._holders = placement.holders[members.own_node_rank]
        self._claims: Mapping[int, Any] | None = None
        self._measuring = threading.Lock()
        self._rate: float | None = None

        def streams_to(holder: Member) -> list[_Stream]:
            copy = 1 + self._holders.index(holder.node_rank)
            silence = bulk(lease)
            return [
                _Stream(self, members, holder, copy, secret, silence)
                for _ in range(num_streams + 1)
            ]

        self._streams_to = streams_to
        self._streams = [streams_to(members.nodes[node]) for node in self._holders]

    def start(self) -> None:
        """Begin; every agent must be listening."""
        for streams in self._streams:
            _start(streams)

    def moved(self, holder: Member) -> None:
        """Another agent has taken the place of a lost one, which held copies if it was a holder:
        from now on it holds them, and those that there are go to it first.

        Raises:
            OSError, EOFError: it is gone.
        """
        if holder.node_rank not in self._holders:
            return
        place, streams = self._holders.index(holder.node_rank), self._streams_to(holder)
        lost, self._streams[place] = self._streams[place], streams
        for stream in lost:
            stream.cut()
        for global_rank in self._ranks:
            for entry in self._held_by_owner(global_rank):
                item = Sealed(global_rank, entry)
                self._stream_of(streams, item).backlog.put(item)
        if self._claims is not None:
            streams[0].announce(self._claims)
        _start(streams)

    def cut(self, node_rank: int) -> None:
        """An agent is lost: nothing waits for it any more."""
        if node_rank in self._holders:
            for stream in self._streams[self._holders.index(node_rank)]:
                stream.cut()

    def stop(self) -> None:
        """The job ends: what is not copied now is no news."""
        self._stopped = True

    def announce(self, claims: Mapping[int, Any]) -> None:
        """Tell every holder what its copies of these ranks will come to, before any frame does.

        Args:
            claims: by global rank, as JSON.
        """
        self._claims = claims
        for streams in self._streams:
            streams[0].announce(claims)

    def measure(self) -> float:
        """Bytes per second at which one local rank's frames get to all their holders while those of
        the others do too; measured once.

        Raises:
            Unreachable: a holder is gone.
        """
        with self._measuring:
            if self._rate is None:
                began = time.monotonic()
                try:
                    with ThreadPoolExecutor(len(self._streams)) as all_holders:
                        list(all_holders.map(lambda streams: streams[0].probe(), self._streams))
                except (OSError, EOFError, AuthenticationError) as error:
                    raise Unreachable(f"a holder of copies is gone: {error}") from error
                seconds = time.monotonic() - began
                self._rate = PROBE_BYTES / seconds / len(self._ranks)
                self._log.emit("measured", what="replication", bytes_per_second=self._rate)
            return self._rate

    def bound(self, global_rank: int, frames: int) -> None:
        """How many frames the copies of a rank may be behind."""
        self._ranks[global_rank].bound = frames

    def sealed(self, global_rank: int, entry: Entry) -> None:
        """A local rank has sealed an entry; returns at once."""
        if not _copied(entry) or not self._num_copies:
            return
        kind, iteration = split_key(entry.key)
        if kind != "frame":
            self._put(Sealed(global_rank, entry))
            return
        with self._lock:
            rank = self._ranks[global_rank]
            rank.sealed = max(rank.sealed, iteration)
            rank.before = iteration - 1 if rank.before is None else rank.before
            rank.acknowledged[entry.key] = {}
        self._put(Sealed(global_rank, entry))
        self._measure(global_rank)

    def copy_held(self) -> None:
        """Copy the frames that the vault has held since before any worker began.

        A cold start loads them from a spill, and a spill holds what a rank has of its own.
        """
        for global_rank in self._ranks:
            entries = self._held_by_owner(global_rank)
            if entries and self._num_copies:
                # The first frames are here all at once: that is no lag.
                self._ranks[global_rank].before = max(split_key(e.key)[1] for e in entries)
            for entry in entries:
                self.sealed(global_rank, entry)

    def _held_by_owner(self, global_rank: int) -> list[Entry]:
        """What this node's vault has of a local rank that is to be copied, ascending."""
        listed = self._store.inventory(global_rank, "")
        held = [self._store.find(global_rank, listing.key) for listing in listed]
        entries = [found[0] for found in held if found and _copied(found[0])]
        return sorted(entries, key=lambda entry: split_key(entry.key)[1])

    def dropped(self, global_rank: int, below: int) -> None:
        """A local rank has dropped entries; returns at once."""
        if not self._num_copies:
            return
        with self._lock:
            acknowledged = self._ranks[global_rank].acknowledged
            for key in [key for key in acknowledged if split_key(key)[1] < below]:
                del acknowledged[key]
        self._put(Dropped(global_rank, below))

    def durable(self) -> dict[int, int]:
        """The newest durable frame of each local rank; -1 is none."""
        with self._lock:
            return {number: rank.durable for number, rank in self._ranks.items()}

    def held(self, item: Sealed) -> Chunk | None:
        """The chunk of a frame that its owner still keeps under this seal; what it has dropped and
        is only kept for a spill is not that.
        """
        found = self._store.find(item.global_rank, item.entry.key)
        if split_key(item.entry.key)[1] < self._store.below(item.global_rank):
            return None
        return found[1] if found is not None and found[0] is item.entry else None

    def acknowledge(self, item: Sealed, copy: int, seconds: float) -> None:
        """A holder has the entry, checked, so many seconds after its turn had come."""
        kind, iteration = split_key(item.entry.key)
        if kind != "frame":
            return
        self._counters.add("copied frames")
        self._counters.add("copied bytes", item.entry.nbytes)
        with self._lock:
            rank = self._ranks[item.global_rank]
            copies = rank.acknowledged.get(item.entry.key)
            if copies is None:
                return
            copies[copy] = seconds
            if len(copies) < self._num_copies:
                return
            rank.durable = max(rank.durable, iteration)
            slowest = max(copies.values())
        self._counters.add("durable frames")
        self._timed(item.global_rank, item.entry.nbytes, slowest * self._ranks_per_stream)
        flip = partial(_flip, self._store, item.global_rank, item.entry.key)
        self._faults.strike("stored", item.global_rank, iteration, 0, flip)
        self._measure(item.global_rank)

    def skip(self, item: Sealed, number: int, why: str) -> None:
        """Frames are not copied; training does not care, but it is said."""
        if self._stopped:
            return
        total = self._counters.add("skipped frames", number)
        fields = {"global_rank": item.global_rank, "key": item.entry.key, "why": why}
        self._log.emit("skipped", number=number, **fields)
        if total == number:
            line = f"{item.entry.key} of rank {item.global_rank} is not copied: {why}"
            print(f"moetion-run: {line}; more are only counted", file=sys.stderr)

    def resent(self, item: Sealed, copy: int) -> None:
        """A frame arrived damaged and is sent again."""
        self._counters.add("resent frames")
        fields = {"global_rank": item.global_rank, "key": item.entry.key}
        self._log.emit("resent", copy=copy, **fields)

    def sound(self, item: Sealed) -> bool:
        """Whether the owner's own bytes are those that were sealed; if not, they are forgotten."""
        global_rank, key = item.global_rank, item.entry.key
        reason = self._store.quarantine(global_rank, key, item.entry.checksum)
        if reason:
            self._quarantined(global_rank, key, 0, reason)
        return not reason

    def _put(self, item: Sealed | Dropped) -> None:
        for streams in self._streams:
            stream = self._stream_of(streams, item)
            if not stream.backlog.put(item) and isinstance(item, Sealed):
                self.skip(item, 1, "its holder is gone")

    def _stream_of(self, streams: Sequence[_Stream], item: Sealed | Dropped) -> _Stream:
        *for_frames, for_headers = streams
        if isinstance(item, Sealed) and split_key(item.entry.key)[0] in SMALL:
            return for_headers
        # Drops go where frames do: those that were sealed before come first.
        return for_frames[(item.global_rank - self._first_rank) % len(for_frames)]

    def _measure(self, global_rank: int) -> None:
        with self._lock:
            rank = self._ranks[global_rank]
            lag = rank.sealed - max(rank.durable, -1 if rank.before is None else rank.before)
            # The frame that was sealed just now is on its way, not late.
            behind = rank.bound is not None and lag > rank.bound + 1
            began, rank.behind = behind and not rank.behind, behind
        self._counters.reach("largest lag in frames", lag)
        if not began:
            return
        self._log.emit("behind", global_rank=global_rank, lag=lag, bound=rank.bound)
        if self._counters.add("times behind") == 1:
            print(
                f"moetion-run: the copies of rank {global_rank}'s frames are {lag} frames behind,"
                " more than is kept for them: another node could not rebuild this one; more is"
                " only counted",
                file=sys.stderr,
            )


class _Stream:
    """One connection to one holder, and the thread that writes to it."""

    def __init__(
        self,
        owner: Replication,
        members: Members,
        holder: Member,
        copy: int,
        secret: bytes,
        silence: timedelta | None,
    ) -> None:
        self._owner, self._copy, self._secret = owner, copy, secret
        self._own, self._holder, self._silence = members.own, holder, silence
        self._channel: Channel | None = None
        self._lock = threading.Lock()
        self.backlog = Backlog()

    def announce(self, claims: Mapping[int, Any]) -> None:
        """See `Replication.announce`; waits for the holder to have heard it.

        Raises:
            OSError, EOFError: it is gone.
        """
        with self._lock:
            channel = self._connected()
            channel.send({"op": "claims", "claims": {str(r): c for r, c in claims.items()}})
            channel.receive()

    def probe(self) -> None:
        """Send bytes that nobody keeps.

        Raises:
            OSError, EOFError: the holder is gone.
        """
        with self._lock:
            channel = self._connected()
            nothing = memoryview(bytearray(PROBE_BYTES))
            told = {"op": "probe", "nbytes": PROBE_BYTES}
            channel.send(told, lambda fd: write_all(fd, nothing))
            channel.receive()

    def cut(self) -> None:
        """The holder is lost; called while another thread may be waiting for it."""
        for item in self.backlog.close():
            if isinstance(item, Sealed):
                self._owner.skip(item, 1, "its holder is gone")
        # Without the lock, which such a waiter holds.
        if self._channel is not None:
            self._channel.cut()

    def run(self) -> None:
        """Tell the holder everything, in order, until it is gone."""
        item: Item | None = None
        try:
            while True:
                item = self.backlog.take()
                with self._lock:
                    self._tell(self._connected(), item)
        except (OSError, EOFError, AuthenticationError) as error:
            left = [item, *self.backlog.close()]
            for lost in [entry for entry in left if isinstance(entry, Sealed)]:
                self._owner.skip(lost, 1, f"node {self._holder.node_rank} is gone ({error})")

    def _connected(self) -> Channel:
        if self._channel is None:
            where = (self._holder.host, self._holder.port)
            self._channel = Channel.to_peer(*where, self._secret, self._silence)
            own = {"node_rank": self._own.node_rank, "tenure": self._own.tenure}
            self._channel.send({"op": "copies", **own})
        return self._channel

    def _tell(self, channel: Channel, item: Item) -> None:
        match item:
            case Dropped():
                channel.send({"op": "drop", "global_rank": item.global_rank, "below": item.below})
            case Forgotten():
                self._forget(channel, item.global_rank, item.key)
            case Sealed():
                began = time.monotonic()
                why = self._send(channel, item)
                if why is None:
                    self._owner.acknowledge(item, self._copy, time.monotonic() - began)
                    return
                late = 0
                if split_key(item.entry.key)[0] == "frame":
                    late = self.backlog.start_anew(item.global_rank)
                self._owner.skip(item, 1 + late, why)
                # What was copied under this key before, if anything, is not the owner's any more.
                self._forget(channel, item.global_rank, item.entry.key)

    def _forget(self, channel: Channel, global_rank: int, key: str) -> None:
        channel.send({"op": "forget", "global_rank": global_rank, "key": key})

    def _send(self, channel: Channel, item: Sealed) -> str | None:
        """Send a frame until it has arrived as it was sealed; otherwise returns why not."""
        entry = item.entry
        head = {
            "op": "copy",
            "global_rank": item.global_rank,
            "key": entry.key,
            "nbytes": entry.nbytes,
            "checksum": entry.checksum,
            "meta": entry.meta,
            "parts": entry.parts,
        }
        for _ in range(MAX_ATTEMPTS):
            chunk = self._owner.held(item)
            if chunk is None:
                return "it was dropped before its turn came: the network is too slow"
            fd = chunk.fd

            def send_bytes(to_fd: int, fd: int = fd) -> None:
                send_file_region(to_fd, fd, entry.offset, entry.nbytes)

            channel.send(head, send_bytes)
            answer = channel.receive()["op"]
            if answer == "stored":
                return None
            if answer == "full":
                return f"node {self._holder.node_rank} has no more room than was claimed"
            # What its owner drops is written over: then the damage is none.
            if self._owner.held(item) is not None:
                if not self._owner.sound(item):
                    return "it is damaged where it was sealed"
                self._owner.resent(item, self._copy)
        return f"it arrived damaged {MAX_ATTEMPTS} times"


def _start(streams: Iterable[_Stream]) -> None:
    for stream in streams:
        threading.Thread(target=stream.run, name="moetion-copies", daemon=True).start()


def _copied(entry: Entry) -> bool:
    return split_key(entry.key)[0] in REPLICATED


def _flip(store: VaultStore, global_rank: int, key: str) -> None:
    found = store.find(global_rank, key)
    if found is not None:
        entry, chunk = found
        map_shared(chunk.path, chunk.nbytes)[entry.offset] ^= 1
