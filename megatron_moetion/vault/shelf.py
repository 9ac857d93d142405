"""Where a vault gets chunks from and publishes entries to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from megatron_moetion.vault.arena import map_private
from megatron_moetion.vault.entry import Entry, Listing
from megatron_moetion.vault.store import VaultStore


class Shelf(Protocol):
    """Where a vault gets chunks from and publishes entries to: an agent or this process."""

    def chunk(self, nbytes: int) -> tuple[int, str, int]:
        """Allocate; returns (number, path, capacity in bytes)."""

    def publish(self, entry: Entry) -> None:
        """The entry is sealed; once this returns it survives the worker."""

    def drop(self, below: int) -> None:
        """Forget this rank's entries below an iteration."""

    def find(
        self, global_rank: int, key: str
    ) -> tuple[torch.Tensor, str, Mapping[str, Any]] | None:
        """Returns (bytes as uint8, checksum, meta) or None."""

    def inventory(self, global_rank: int, prefix: str) -> list[Listing]:
        """Sealed entries of any rank of the job."""


class StoreShelf:
    """A shelf in this very process."""

    def __init__(self, store: VaultStore, global_rank: int) -> None:
        self._store = store
        self._global_rank = global_rank

    def chunk(self, nbytes: int) -> tuple[int, str, int]:
        chunk = self._store.new_chunk(self._global_rank, nbytes)
        return chunk.number, chunk.path, chunk.nbytes

    def publish(self, entry: Entry) -> None:
        self._store.publish(self._global_rank, entry)

    def drop(self, below: int) -> None:
        self._store.drop(self._global_rank, below)

    def find(
        self, global_rank: int, key: str
    ) -> tuple[torch.Tensor, str, Mapping[str, Any]] | None:
        found = self._store.find(global_rank, key)
        if found is None:
            return None
        entry, chunk = found
        return map_private(chunk.path, entry.offset, entry.nbytes), entry.checksum, entry.meta

    def inventory(self, global_rank: int, prefix: str) -> list[Listing]:
        return self._store.inventory(global_rank, prefix)
