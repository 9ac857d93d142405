"""The worker's side of the vault: reserve, seal, fetch, drop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moetion.vault.arena import align, map_shared, size_class
from megatron_moetion.vault.entry import Entry, Listing, damage, seal, split_key
from megatron_moetion.vault.shelf import Shelf, StoreShelf
from megatron_moetion.vault.store import VaultStore

_NOTHING = "-"
"""No key begins with it."""
MAX_READS = 3
"""Of one copy that its holder finds sound: then it is the way here that damages it."""


class CorruptEntry(RuntimeError):
    """No copy of an entry has the bytes that were sealed."""

    def __init__(self, global_rank: int, key: str, reason: str) -> None:
        super().__init__(f"vault entry {key} of rank {global_rank} is damaged: {reason}")
        self.global_rank, self.key = global_rank, key


@dataclass(frozen=True)
class Fetched:
    """A sealed entry as read back.

    Attributes:
        data: uint8, shape [nbytes]. Writing to it never reaches the vault; it is good until the
            owner of the entry drops it, so copy what must live longer.
        meta: what was given to `seal`.
    """

    data: torch.Tensor
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class VaultUsage:
    """Counters of one worker's part of the vault.

    Attributes:
        reserved_bytes: capacity of all chunks, in use or free.
        used_bytes: bytes of regions being written or sealed.
        num_entries: sealed entries.
        num_chunks: chunks, in use or free.
    """

    reserved_bytes: int
    used_bytes: int
    num_entries: int
    num_chunks: int


@dataclass(eq=False)
class _OpenChunk:
    """A mapped chunk that holds entries of one kind and iteration, or none when it is free."""

    number: int
    memory: torch.Tensor
    frames: bool
    end: int = 0
    num_regions: int = 0


@dataclass(eq=False)
class _Region:
    chunk: _OpenChunk
    offset: int
    nbytes: int

    def view(self) -> torch.Tensor:
        return self.chunk.memory[self.offset : self.offset + self.nbytes]


class Vault:
    """One worker's view of the vault. All methods may be called by any thread.

    A region is WRITING from `reserve` to `seal`, then SEALED until `drop`. Only sealed entries
    can be fetched, by this worker, its replacement or any other rank.

    Args:
        shelf: the agent, or this process (`LocalVault`).
        global_rank: whose entries `seal` and `drop` mean.
        on_map: called once with each newly mapped chunk (uint8), for example to pin it.
        on_unmap: called with each of them that is given back by `trim`.
    """

    def __init__(
        self,
        shelf: Shelf,
        global_rank: int,
        on_map: Callable[[torch.Tensor], None] | None = None,
        on_unmap: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.global_rank = global_rank
        self._shelf = shelf
        self._on_map, self._on_unmap = on_map, on_unmap
        self._lock = threading.RLock()
        self._filling: dict[tuple[str, int], _OpenChunk] = {}
        self._free: dict[int, list[_OpenChunk]] = {}
        self._chunks: list[_OpenChunk] = []
        self._writing: dict[str, _Region] = {}
        self._sealed: dict[str, _Region] = {}
        self._below = 0
        # The other lock is held while the agent is asked for memory, and its answer may wait behind
        # the notice that calls `release`.
        self._kept_lock = threading.Lock()
        self._kept = range(0)

    def reserve(self, key: str, nbytes: int) -> torch.Tensor:
        """Get a region to write an entry into.

        A frame has a chunk of its own; other kinds share one per kind and iteration.

        Args:
            key: "<kind>/<iteration>/<rest>".
            nbytes: length in bytes.

        Returns:
            uint8 tensor of shape [nbytes], 64-byte aligned, contents undefined. The caller may
            write to it until it calls `seal` or `abandon`.

        Raises:
            ValueError: bad key, or the key is already being written.
        """
        kind, iteration = split_key(key)
        with self._lock:
            if key in self._writing:
                raise ValueError(f"vault entry {key} is already being written: seal or abandon it")
            chunk = self._chunk_for(kind, iteration, nbytes)
            region = _Region(chunk, align(chunk.end), nbytes)
            chunk.end = region.offset + nbytes
            chunk.num_regions += 1
            self._writing[key] = region
            return region.view()

    def seal(self, key: str, meta: Mapping[str, Any], ends: Sequence[tuple[str, int]] = ()) -> None:
        """Checksum a reserved region and publish it; an older entry under the key is replaced.

        Once this returns the entry survives this process, and the caller must not write to the
        region again.

        Args:
            key: as given to `reserve`.
            meta: JSON object.
            ends: names of the region's parts and where each ends, so that damage can be named.

        Raises:
            KeyError: the key was not reserved.
        """
        with self._lock:
            region = self._writing[key]
        digest, parts = seal(region.view().numpy(), ends)
        with self._lock:
            if self._writing.pop(key, None) is not region:
                raise KeyError(f"vault entry {key} was abandoned while it was being sealed")
            if split_key(key)[1] < self._below:
                self._leave(region)
                return
            self._shelf.publish(
                Entry(key, region.chunk.number, region.offset, region.nbytes, digest, meta, parts)
            )
            older = self._sealed.pop(key, None)
            self._sealed[key] = region
            if older is not None:
                self._leave(older)

    def put(self, key: str, data: torch.Tensor, meta: Mapping[str, Any]) -> None:
        """Reserve, copy and seal in one call.

        Args:
            key: "<kind>/<iteration>/<rest>".
            data: uint8, one-dimensional, in host memory. Once this returns, the caller may
                overwrite it.
            meta: JSON object.
        """
        self.reserve(key, data.numel()).copy_(data)
        self.seal(key, meta)

    def confirm(self) -> None:
        """Returns once everybody can read what was sealed here: until then it may be on its way to
        the agent, which others ask over connections of their own.
        """
        self._shelf.inventory(self.global_rank, _NOTHING)

    def abandon(self, key: str | None = None) -> None:
        """Give up one region that is being written, or all of them; no-op if there is none.

        Call it only when nothing writes to the region any more.
        """
        with self._lock:
            for name in [key] if key is not None else list(self._writing):
                region = self._writing.pop(name, None)
                if region is not None:
                    self._leave(region)

    def drop(self, below: int) -> None:
        """Forget this rank's entries whose iteration is below `below`, also a predecessor's.

        Regions still being written are forgotten when they are sealed.
        """
        with self._lock:
            # The agent must forget first: a chunk that is reused must no longer be indexed.
            self._shelf.drop(below)
            self._below = max(self._below, below)
            iterations, kept = {key: split_key(key)[1] for key in self._sealed}, self._kept
            for key in [k for k, i in iterations.items() if i < below and i not in kept]:
                self._leave(self._sealed.pop(key))

    def trim(self, capacities: AbstractSet[int]) -> None:
        """Give back the free chunks of frames, but for those of some capacities (bytes).

        For when frames have got another size: what is free now would lie idle for ever.
        """
        with self._lock:
            for capacity in self._free.keys() - capacities:
                given = [chunk for chunk in self._free[capacity] if chunk.frames]
                for chunk in given:
                    self._free[capacity].remove(chunk)
                    self._chunks.remove(chunk)
                    if self._on_unmap is not None:
                        self._on_unmap(chunk.memory)
                    self._shelf.discard(chunk.number)

    def keep(self, iterations: range) -> bool:
        """Leave sealed entries of these iterations alone although they are dropped, for the agent
        to read.

        Returns:
            False when others are kept already: one stretch at a time, so that memory is bounded.
        """
        with self._kept_lock:
            if self._kept:
                return False
            self._kept = iterations
            return True

    def release(self, iterations: range) -> None:
        """Undo `keep`: the next `drop` counts for these too. No-op unless they are what is kept.

        Never waits for the agent, so that the listener of its notices may call it.
        """
        with self._kept_lock:
            if self._kept == iterations:
                self._kept = range(0)

    def fetch(self, global_rank: int, key: str) -> Fetched | None:
        """Read a sealed entry of any rank of the job.

        A damaged copy is put in quarantine by whoever holds it, and the next one is read.

        Returns:
            The entry, or None when there is no such sealed entry. For the lifetime of the bytes
            see `Fetched`.

        Raises:
            CorruptEntry: there was a copy, and none is sound.
            Unreachable: see `Shelf.find`.
        """
        reason: str | None = None
        reads = 0
        while (found := self._shelf.find(global_rank, key)) is not None:
            reason = damage(found.data.numpy(), found.checksum, found.parts)
            if reason is None:
                return Fetched(found.data, found.meta)
            verdict = self._shelf.quarantine(global_rank, key, found)
            if verdict is None:
                # It was dropped while it was read.
                reason = None
            elif not verdict:
                reads += 1
                if reads == MAX_READS:
                    break
        if reason is None:
            return None
        raise CorruptEntry(global_rank, key, reason)

    def distrust(self, global_rank: int, key: str, reason: str) -> None:
        """Put every copy of an entry in quarantine, sound ones too: it was sealed as it is.

        Raises:
            CorruptEntry: always.
        """
        while (found := self._shelf.find(global_rank, key)) is not None:
            self._shelf.quarantine(global_rank, key, found, reason)
        raise CorruptEntry(global_rank, key, reason)

    def inventory(self, global_rank: int, prefix: str) -> list[Listing]:
        """Sealed entries of any rank whose key starts with `prefix`, in order of sealing.

        Raises:
            Unreachable: see `Shelf.inventory`.
        """
        return self._shelf.inventory(global_rank, prefix)

    def usage(self) -> VaultUsage:
        """Counters for metrics."""
        with self._lock:
            regions = [*self._writing.values(), *self._sealed.values()]
            return VaultUsage(
                reserved_bytes=sum(chunk.memory.numel() for chunk in self._chunks),
                used_bytes=sum(region.nbytes for region in regions),
                num_entries=len(self._sealed),
                num_chunks=len(self._chunks),
            )

    def _chunk_for(self, kind: str, iteration: int, nbytes: int) -> _OpenChunk:
        if kind == "frame":
            return self._take_any(nbytes) or self._take(nbytes, frames=True)
        chunk = self._filling.get((kind, iteration))
        if chunk is None or align(chunk.end) + nbytes > chunk.memory.numel():
            chunk = self._filling[kind, iteration] = self._take(nbytes)
        return chunk

    def _take_any(self, nbytes: int) -> _OpenChunk | None:
        """The smallest free chunk that is large enough: the one of the dense first frame, which is
        the largest of all, must not lie idle for ever.
        """
        capacity = min((c for c, free in self._free.items() if free and c >= nbytes), default=None)
        if capacity is None:
            return None
        chunk = self._free[capacity].pop()
        chunk.frames = True
        return chunk

    def _take(self, nbytes: int, frames: bool = False) -> _OpenChunk:
        free = self._free.get(size_class(nbytes))
        if free:
            return free.pop()
        number, path, capacity = self._shelf.chunk(nbytes)
        chunk = _OpenChunk(number, map_shared(path, capacity), frames)
        if self._on_map is not None:
            self._on_map(chunk.memory)
        self._chunks.append(chunk)
        return chunk

    def _leave(self, region: _Region) -> None:
        chunk = region.chunk
        chunk.num_regions -= 1
        if chunk.num_regions == 0:
            chunk.end = 0
            self._filling = {
                slot: held for slot, held in self._filling.items() if held is not chunk
            }
            self._free.setdefault(chunk.memory.numel(), []).append(chunk)


class LocalVault(Vault):
    """A vault without an agent (plain torchrun, srun): it dies with the worker.

    Other ranks' entries are never found here.
    """

    def __init__(
        self,
        global_rank: int,
        on_map: Callable[[torch.Tensor], None] | None = None,
        on_unmap: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._store = VaultStore()
        super().__init__(StoreShelf(self._store, global_rank), global_rank, on_map, on_unmap)
