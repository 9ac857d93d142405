"""Where a vault gets chunks from and publishes entries to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_moetion.vault.arena import map_private
from megatron_moetion.vault.entry import Entry, Listing, Parts
from megatron_moetion.vault.store import VaultStore


class Unreachable(RuntimeError):
    """Whether an entry is held cannot be told, or it cannot be read: a node that may hold it is
    gone. Not the same as missing: the failure that explains it is about to be known.
    """


@dataclass(frozen=True)
class Found:
    """One copy of a sealed entry, unchecked.

    Attributes:
        data: uint8, shape [nbytes]; for its lifetime see `client.Fetched`.
        checksum: of the entry.
        parts: of the entry.
        meta: of the entry.
        node_rank: whose agent holds this copy; None without agents.
    """

    data: torch.Tensor
    checksum: str
    parts: Parts
    meta: Mapping[str, Any]
    node_rank: int | None = None


class Shelf(Protocol):
    """Where a vault gets chunks from and publishes entries to: an agent or this process."""

    def chunk(self, nbytes: int) -> tuple[int, str, int]:
        """Allocate; returns (number, path, capacity in bytes)."""

    def discard(self, number: int) -> None:
        """Give a chunk back; nothing that is needed lies in it."""

    def publish(self, entry: Entry) -> None:
        """The entry is sealed; once this returns it survives the worker."""

    def drop(self, below: int) -> None:
        """Forget this rank's entries below an iteration."""

    def find(self, global_rank: int, key: str) -> Found | None:
        """The nearest copy that is not in quarantine, or None.

        Raises:
            Unreachable: nobody has it of those that can be asked, and others cannot.
        """

    def quarantine(
        self, global_rank: int, key: str, found: Found, distrusted: str | None = None
    ) -> str | None:
        """Have the holder of a copy read it again; see `VaultStore.quarantine`."""

    def inventory(self, global_rank: int, prefix: str) -> list[Listing]:
        """Sealed entries of any rank of the job.

        Raises:
            Unreachable: the rank's node is gone.
        """


class StoreShelf:
    """A shelf in this very process."""

    def __init__(self, store: VaultStore, global_rank: int) -> None:
        self._store = store
        self._global_rank = global_rank

    def chunk(self, nbytes: int) -> tuple[int, str, int]:
        chunk = self._store.new_chunk(self._global_rank, nbytes)
        return chunk.number, chunk.path, chunk.nbytes

    def discard(self, number: int) -> None:
        self._store.discard(self._global_rank, number)

    def publish(self, entry: Entry) -> None:
        self._store.publish(self._global_rank, entry)

    def drop(self, below: int) -> None:
        self._store.drop(self._global_rank, below)

    def find(self, global_rank: int, key: str) -> Found | None:
        found = self._store.find(global_rank, key)
        if found is None:
            return None
        entry, chunk = found
        data = map_private(chunk.path, entry.offset, entry.nbytes)
        return Found(data, entry.checksum, entry.parts, entry.meta)

    def quarantine(
        self, global_rank: int, key: str, found: Found, distrusted: str | None = None
    ) -> str | None:
        return self._store.quarantine(global_rank, key, found.checksum, distrusted)

    def inventory(self, global_rank: int, prefix: str) -> list[Listing]:
        return self._store.inventory(global_rank, prefix)
