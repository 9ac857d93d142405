"""Typed access to logged entries: tensors and small state, by key, in any rank's vault."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_moetion.inbox.key import Key
from megatron_moetion.snapshot import bundle
from megatron_moetion.vault import CorruptEntry, Unreachable


class Entry(Protocol):
    """What a vault hands out: raw bytes (uint8, CPU) and their JSON description."""

    @property
    def data(self) -> torch.Tensor: ...

    @property
    def meta(self) -> Mapping[str, Any]: ...


class Store(Protocol):
    """The part of the vault that the inbox needs; see `megatron_moetion.vault.client`."""

    def put(self, key: str, data: torch.Tensor, meta: dict[str, Any]) -> None: ...

    def fetch(self, global_rank: int, key: str) -> Entry | None: ...


class InboxLog:
    """Writes this rank's entries, reads anybody's.

    Attributes:
        epoch: of the last recovery, put on what is written: copies of what is given up later may
            outlive it.
    """

    def __init__(self, store: Store, global_rank: int, device: torch.device | str = "cpu") -> None:
        self._store, self._global_rank, self._device = store, global_rank, device
        self.epoch = 0

    def write(
        self, key: Key, tensors: Sequence[torch.Tensor], check: Callable[[], None] | None = None
    ) -> None:
        """Logs tensors. Once this returns, the caller may overwrite or free the sources.

        Args:
            check: called when their bytes have been read and nobody can see the entry yet; what it
                raises leaves no entry.
        """
        self.write_state(key, [t.detach() for t in tensors], check)

    def read(
        self, key: Key, global_ranks: Iterable[int], since: int = 0
    ) -> list[torch.Tensor] | None:
        """Fresh copies of the logged tensors from the first rank that has them, or None.

        Args:
            since: what was written in an earlier epoch does not count.
        """
        found = self.read_state(key, global_ranks, since)
        assert found is None or isinstance(found, list)
        return found

    def write_state(self, key: Key, state: Any, check: Callable[[], None] | None = None) -> None:
        """Logs nested containers of tensors and scalars (see `snapshot.bundle`).

        Args:
            check: see `write`.

        Raises:
            bundle.Unsupported: naming a value that cannot be logged.
        """
        meta, data = bundle.pack(state)
        if check is not None:
            check()
        self._store.put(str(key), data, {**meta, "epoch": self.epoch})

    def read_state(
        self, key: Key, global_ranks: Iterable[int] | None = None, since: int = 0
    ) -> Any:
        """The logged state, or None when none of these ranks (default: this one) has it.

        Args:
            since: what was written in an earlier epoch does not count.

        Raises:
            CorruptEntry: each copy that there is is damaged.
            Unreachable: nobody has it of those that can be asked, and others cannot.
        """
        unread: CorruptEntry | Unreachable | None = None
        for rank in (self._global_rank,) if global_ranks is None else global_ranks:
            try:
                entry = self._store.fetch(rank, str(key))
            except CorruptEntry as error:
                unread = unread or error
                continue
            except Unreachable as error:
                # The only one of the two that may be otherwise in the next round.
                unread = error
                continue
            if entry is not None and entry.meta["epoch"] >= since:
                return bundle.unpack(entry.meta, entry.data, self._device)
        if unread is not None:
            raise unread
        return None
