"""This node's part of spills: one thread that writes and removes, never the main loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_moetion.agent.membership import Members
from megatron_moetion.vault import spill
from megatron_moetion.vault.spill import Record, Span
from megatron_moetion.vault.store import VaultStore

KEPT = 2
"""Valid spills that stay: the newest, and one more in case that it is damaged."""


@dataclass(frozen=True)
class Written:
    """This node's part of a spill is written, or was given up for `error`."""

    span: Span
    error: str
    nbytes: int
    seconds: float


class Spiller:
    """Writes, keeps and removes this node's parts.

    Args:
        root: folder of all spills.
        members: all nodes.
        store: this node's vault.
        job: the run's id, part of every spill's name.
        started_from: name of the spill that the job started from, if any.
        done: called with the outcome of each `write`, by the writing thread.
    """

    def __init__(
        self,
        root: Path,
        members: Members,
        store: VaultStore,
        job: str,
        started_from: str | None,
        done: Callable[[Written], None],
    ) -> None:
        self._root, self._members, self._store = root, members, store
        self._job, self._done = job, done
        self._valid = [started_from] if started_from is not None else []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moetion-spill")

    def write(self, span: Span, identity: Mapping[str, str]) -> None:
        """Write this node's part in the background, then call `done`."""
        own, name = self._members.own.node_rank, spill.name_of(span.iteration, self._job)
        began = time.monotonic()

        def told(future: Future[Record]) -> None:
            error = future.exception()
            nbytes = 0 if error is not None else future.result().nbytes
            seconds = time.monotonic() - began
            self._done(Written(span, str(error) if error is not None else "", nbytes, seconds))

        layout = self._members.ranks_of_node
        writing = self._thread.submit(
            spill.write, self._root, self._store, name, span, own, layout, identity
        )
        writing.add_done_callback(told)

    def settle(self, span: Span, valid: bool) -> None:
        """Remove what is not needed any more, in the background."""
        own, name = self._members.own, spill.name_of(span.iteration, self._job)
        if not valid:
            self._thread.submit(spill.discard, self._root, name, own.node_rank, own.global_ranks)
            return
        self._valid = [*self._valid, name][-KEPT:]
        self._thread.submit(
            spill.prune, self._root, tuple(self._valid), own.node_rank, own.global_ranks
        )
