"""The agent's side of the vault: which sealed entry of which rank lies in which chunk."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

from megatron_moetion.vault.arena import Chunk, map_private, size_class
from megatron_moetion.vault.entry import Entry, Listing, damage, split_key


@dataclass
class _Held:
    """A chunk in use: by whom, and how many index entries point into it."""

    chunk: Chunk
    global_rank: int
    num_entries: int = 0
    orphaned: bool = False
    copy: bool = False


class VaultStore:
    """Index of sealed entries per global rank, and the chunks that they lie in.

    A live worker reuses its own chunks; when it dies its empty chunks come back at once and the
    others as soon as the last entry in them is dropped. Chunks with copies of other nodes' entries
    are never a worker's; each holds one entry. All methods may be called by any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._held: dict[int, _Held] = {}
        self._free: dict[int, list[Chunk]] = {}
        self._free_for_copies: dict[int, list[Chunk]] = {}
        self._index: dict[int, dict[str, Entry]] = {}
        self._below: dict[int, int] = {}
        self._pinned: dict[int, range] = {}
        self._hollow: set[int] = set()

    def new_chunk(self, global_rank: int, nbytes: int) -> Chunk:
        """Hand out a chunk of at least `nbytes` to a live worker."""
        with self._lock:
            free = self._free.get(size_class(nbytes))
            chunk = free.pop() if free else Chunk.create(next(self._numbers), nbytes)
            self._hollow.discard(chunk.number)
            self._held[chunk.number] = _Held(chunk, global_rank)
            return chunk

    def discard(self, global_rank: int, number: int) -> None:
        """A live worker has no use for one of its chunks any more: its memory is given back.

        Raises:
            ValueError: it is not that rank's, or an entry lies in it.
        """
        with self._lock:
            held = self._held.get(number)
            if held is None or held.global_rank != global_rank or held.num_entries:
                raise ValueError(f"chunk {number} is not an empty one of rank {global_rank}")
            del self._held[number]
            held.chunk.hollow_out()
            self._hollow.add(number)
            self._free.setdefault(held.chunk.nbytes, []).append(held.chunk)

    def chunk_for_copy(self, global_rank: int, nbytes: int, limit_bytes: int) -> Chunk | None:
        """A chunk for the copy of one entry; `give_back` it or publish the entry in it.

        Args:
            global_rank: of another node, whose entry it is.
            limit_bytes: capacity of all chunks with copies of that rank's entries.

        Returns:
            None when the limit would be passed.
        """
        with self._lock:
            free = self._free_for_copies.setdefault(global_rank, [])
            free.sort(key=lambda chunk: chunk.nbytes)
            chunk = next((chunk for chunk in free if chunk.nbytes >= nbytes), None)
            if chunk is not None:
                free.remove(chunk)
            else:
                in_use = [h.chunk for h in self._held.values() if h.global_rank == global_rank]
                left = limit_bytes - sum(held.nbytes for held in [*in_use, *free])
                while free and left < size_class(nbytes):
                    left += free[0].nbytes
                    free.pop(0).close()
                if left < size_class(nbytes):
                    return None
                chunk = Chunk.create(next(self._numbers), nbytes)
            self._held[chunk.number] = _Held(chunk, global_rank, orphaned=True, copy=True)
            return chunk

    def give_back(self, chunk: Chunk) -> None:
        """A chunk for a copy holds nothing after all."""
        with self._lock:
            self._reclaim(self._held[chunk.number])

    def publish(self, global_rank: int, entry: Entry) -> None:
        """Index a sealed entry; an older one under the same key is forgotten.

        Raises:
            ValueError: the region does not lie in a chunk of that rank.
        """
        split_key(entry.key)
        with self._lock:
            held = self._held.get(entry.chunk)
            if held is None or held.global_rank != global_rank:
                raise ValueError(
                    f"entry {entry.key}: chunk {entry.chunk} is not of rank {global_rank}"
                )
            if (
                entry.offset < 0
                or entry.nbytes < 0
                or entry.offset + entry.nbytes > held.chunk.nbytes
            ):
                raise ValueError(f"entry {entry.key} does not fit in chunk {entry.chunk}")
            held.num_entries += 1
            index = self._index.setdefault(global_rank, {})
            older = index.get(entry.key)
            index[entry.key] = entry
            if older is not None:
                self._leave(older)

    def drop(self, global_rank: int, below: int) -> None:
        """Forget the entries of a rank whose iteration is below `below`, pinned ones later."""
        with self._lock:
            self._below[global_rank] = max(below, self._below.get(global_rank, 0))
            self._drop(global_rank)

    def pin(self, global_rank: int, iterations: range) -> None:
        """Keep entries of these iterations, and of no others, beyond their `drop`."""
        with self._lock:
            self._pinned[global_rank] = iterations
            self._drop(global_rank)

    def unpin(self, global_rank: int, iterations: range) -> None:
        """Undo `pin`: what was to be dropped in the meantime is dropped now. No-op unless these
        are what is pinned.
        """
        with self._lock:
            if self._pinned.get(global_rank) == iterations:
                del self._pinned[global_rank]
                self._drop(global_rank)

    def forget(self, global_rank: int, key: str) -> None:
        """Forget one entry; no-op if there is none."""
        with self._lock:
            entry = self._index.get(global_rank, {}).pop(key, None)
            if entry is not None:
                self._leave(entry)

    def quarantine(
        self, global_rank: int, key: str, sealed: str, distrusted: str | None = None
    ) -> str | None:
        """Read an entry again, and forget it if its bytes are not those that were sealed.

        Args:
            sealed: checksum of the entry that is meant.
            distrusted: why it is to be forgotten in any case.

        Returns:
            How they differ, "" when they do not, None when there is no such entry any more.
        """
        found = self.find(global_rank, key)
        if found is None or found[0].checksum != sealed:
            return None
        entry, chunk = found
        data = map_private(chunk.path, entry.offset, entry.nbytes)
        reason = damage(data.numpy(), entry.checksum, entry.parts) or distrusted
        with self._lock:
            index = self._index.get(global_rank, {})
            if index.get(key) is not entry:
                # Its owner dropped it and may have written over it.
                return None
            if reason is not None:
                self._leave(index.pop(key))
        return reason or ""

    def orphan(self, global_rank: int) -> None:
        """The worker of this rank is gone; its sealed entries stay, its empty chunks come back."""
        with self._lock:
            for held in list(self._held.values()):
                if held.global_rank == global_rank:
                    held.orphaned = True
                    self._reclaim(held)

    def find(self, global_rank: int, key: str) -> tuple[Entry, Chunk] | None:
        """Where a sealed entry lies, or None."""
        with self._lock:
            entry = self._index.get(global_rank, {}).get(key)
            return None if entry is None else (entry, self._held[entry.chunk].chunk)

    def inventory(self, global_rank: int, prefix: str) -> list[Listing]:
        """Sealed entries of a rank whose key starts with `prefix`, in order of sealing."""
        with self._lock:
            return [
                Listing(entry.key, entry.nbytes, entry.meta)
                for key, entry in self._index.get(global_rank, {}).items()
                if key.startswith(prefix)
            ]

    def copied_ranks(self) -> list[int]:
        """Global ranks of other nodes of which there are copies."""
        with self._lock:
            return sorted({held.global_rank for held in self._held.values() if held.copy})

    def below(self, global_rank: int) -> int:
        """Everything of a rank below this iteration has been dropped."""
        with self._lock:
            return self._below.get(global_rank, 0)

    def allocated_bytes(self) -> int:
        """Capacity of all chunks that may hold memory, in use or free."""
        with self._lock:
            in_use = [held.chunk for held in self._held.values()]
            free = [*self._free.values(), *self._free_for_copies.values()]
            return sum(
                chunk.nbytes
                for chunks in [in_use, *free]
                for chunk in chunks
                if chunk.number not in self._hollow
            )

    def close(self) -> None:
        """Give all memory back; mappings in other processes stay valid until they go."""
        with self._lock:
            for held in self._held.values():
                held.chunk.close()
            for chunks in [*self._free.values(), *self._free_for_copies.values()]:
                for chunk in chunks:
                    chunk.close()
            self._held.clear()
            self._free.clear()
            self._free_for_copies.clear()
            self._index.clear()

    def __del__(self) -> None:
        # The descriptors of one that nobody holds any more are counted against its process.
        self.close()

    def _drop(self, global_rank: int) -> None:
        index = self._index.get(global_rank, {})
        below, pinned = self._below.get(global_rank, 0), self._pinned.get(global_rank, range(0))
        iterations = {key: split_key(key)[1] for key in index}
        for key in [key for key, i in iterations.items() if i < below and i not in pinned]:
            self._leave(index.pop(key))

    def _leave(self, entry: Entry) -> None:
        held = self._held[entry.chunk]
        held.num_entries -= 1
        self._reclaim(held)

    def _reclaim(self, held: _Held) -> None:
        if held.orphaned and held.num_entries == 0:
            del self._held[held.chunk.number]
            pool, slot = self._free, held.chunk.nbytes
            if held.copy:
                pool, slot = self._free_for_copies, held.global_rank
            pool.setdefault(slot, []).append(held.chunk)
