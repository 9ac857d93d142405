"""The taps of one rank out of two pipelines of two stages, with all ranks' logs in one store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.inbox.tap import BatchTap, BoundaryTap, CollectiveTap, Cursor, Mode
from megatron_moetion.recovery.plan import Progress
from megatron_moetion.recovery.regroup import GroupRecorder
from megatron_moetion.topology import from_pipeline_groups
from megatron_moetion.vault import Vault
from megatron_moetion.vault.shelf import StoreShelf
from megatron_moetion.vault.store import VaultStore

PIPELINES = [(0, 2), (1, 3)]
ITERATION = 5


class ScriptedGate:
    """Remembers what it was asked; `on_pause` and `on_await` play the rest of the job."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.on_await: Callable[[], None] = lambda: None
        self.on_pause: Callable[[], None] = lambda: None

    def await_commit(self, error: Exception) -> None:
        self.asked.append("await_commit")
        self.on_await()

    def pause(self, error: Exception) -> None:
        self.asked.append("pause")
        self.on_pause()

    def update(self, run: Callable[[], Any]) -> Any:
        self.asked.append("update")
        return run()

    def reached(self, place: str) -> None:
        self.asked.append(place)


class Stage:
    """The taps of global rank 0, and the logs of all ranks."""

    def __init__(self, store: VaultStore, groups: GroupRecorder) -> None:
        self.cursor = Cursor(Mode.LIVE, ITERATION, Progress.BEFORE_COMMIT)
        self.logs = [InboxLog(Vault(StoreShelf(store, r), r), r) for r in range(4)]
        self.gate, topology = ScriptedGate(), from_pipeline_groups(0, PIPELINES)
        self.groups, self.log = groups, self.logs[0]
        self.collectives = CollectiveTap(self.cursor, self.log, topology, groups, self.gate)
        self.boundaries = BoundaryTap(self.cursor, self.log, topology)
        self.batches = BatchTap(self.cursor, self.log)

    def restart(self, mode: Mode) -> None:
        """Goes back to the start of the iteration, as a replay or a second try does."""
        self.cursor.counts.clear()
        self.cursor.mode, self.cursor.progress = mode, Progress.BEFORE_COMMIT


class Collective:
    """A host function with torch's signature: fails or adds 1, as scripted, and counts calls."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(
        self, tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> None:
        self.calls += 1
        tensor += 1
        if self.errors:
            raise self.errors.pop(0)
