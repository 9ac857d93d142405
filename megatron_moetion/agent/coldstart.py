"""The start of a job: which spill, if any, all nodes can go on from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moetion.agent.membership import KeyValues, Members, all_have_read
from megatron_moetion.recovery.plan import Position, Progress
from megatron_moetion.vault import spill
from megatron_moetion.vault.spill import DamagedSpill, Record
from megatron_moetion.vault.store import VaultStore

MAX_TOLD = 3
"""Differences that a refusal names."""
Share = Callable[[str, Any], list[Any]]
"""Tells every node a JSON value under a topic; returns what all nodes said, by node rank."""


class SpillDoesNotFit(RuntimeError):
    """The newest spill is of another run; one line with what to do."""


class NoSpillLeft(RuntimeError):
    """There were spills, none is sound, and no checkpoint of the host; one line what to do."""


def share_over(store: KeyValues, members: Members) -> Share:
    """`Share` over the job's store."""

    def share(topic: str, value: Any) -> list[Any]:
        key = f"moetion/cold/{topic}"
        store.set(f"{key}/{members.own.node_rank}", json.dumps(value))
        said = [json.loads(store.get(f"{key}/{node.node_rank}")) for node in members.nodes]
        all_have_read(store, key, members.own.node_rank, len(members.nodes))
        return said

    return share


@dataclass(frozen=True)
class ColdStart:
    """Finds and loads the newest spill that is valid on all nodes.

    Args:
        root: folder of all spills on this node; nodes may share it or not.
        members: all nodes.
        share: see `Share`.
        checkpoint: iteration of the host's own checkpoint that the job would load, if any.
        expected: iteration of a spill that must be there, as the job begins again for it.
    """

    root: Path
    members: Members
    share: Share
    checkpoint: int | None
    expected: int | None = None

    def take(self, store: VaultStore) -> Record | None:
        """Load it into the store and say in one line what the job starts from.

        Raises:
            SpillDoesNotFit: it was made on other nodes or ranks.
            NoSpillLeft: training would begin afresh though it had been spilled.
        """
        own = self.members.own.node_rank
        said = self.share("spills", [spill.names(self.root, own), self.checkpoint])
        names = set.intersection(*(set(names) for names, _ in said))
        checkpoint = said[0][1]
        for name in sorted(names, reverse=True):
            iteration = spill.iteration_of(name)
            if checkpoint is not None and checkpoint > iteration:
                newer = f"the checkpoint of iteration {checkpoint} is newer"
                self._say(f"not started from the spill of iteration {iteration}: {newer}")
                return None
            record = self._load(name, store)
            if record is not None:
                older = "" if checkpoint is None else f"; the checkpoint is of {checkpoint}"
                self._say(f"starting from the spill of iteration {iteration} in {self.root}{older}")
                return record
        if checkpoint is not None:
            self._say(f"no valid spill in {self.root}: --load of iteration {checkpoint}")
        elif names or self.expected is not None:
            raise NoSpillLeft(
                f"no spill in {self.root} is sound, and --load names no Megatron checkpoint: give"
                " one, or start afresh with another --moetion-dir"
            )
        else:
            self._say(f"no valid spill in {self.root}: a fresh start")
        return None

    def _load(self, name: str, store: VaultStore) -> Record | None:
        """One spill, if it is good on every node."""
        error, record, fits = "", None, True
        try:
            record = spill.read_record(self.root, name, self.members.own.node_rank)
            fits = record.layout == self.members.ranks_of_node
            if fits:
                spill.load(self.root, record, store)
        except DamagedSpill as damage:
            error = str(damage)
            print(f"moetion-run: damaged spill: {error}", file=sys.stderr)
        answers = self.share(name, [error, fits])
        if not all(fits for _, fits in answers):
            there = f"{record.layout}" if record is not None else "other nodes"
            raise SpillDoesNotFit(
                f"the spill {self.root / name} was made with ranks {there} by node and this job"
                f" has {self.members.ranks_of_node}: start it like that one, or afresh with"
                " another --moetion-dir"
            )
        if any(error for error, _ in answers):
            if not error and record is not None:
                spill.unload(record, store)
            return None
        return record

    def _say(self, line: str) -> None:
        if self.members.own.node_rank == 0:
            print(f"moetion-run: {line}", file=sys.stderr)


def position_at(iteration: int) -> dict[str, object]:
    """Where every rank of a spill is: at the start of the next iteration."""
    position = Position(iteration + 1, Progress.BEFORE_COMMIT, iteration, iteration)
    return position.to_json()


def mismatch(record: Record, identity: dict[str, str]) -> str | None:
    """Why a run cannot go on from a spill, in one line with what to do, or None."""
    names = sorted(record.identity.keys() | identity.keys())
    different = [n for n in names if record.identity.get(n) != identity.get(n)]
    if not different:
        return None
    told = [
        f"{name} was {record.identity.get(name, 'not there')} and is"
        f" {identity.get(name, 'not there')}"
        for name in different[:MAX_TOLD]
    ]
    more = f" and {len(different) - MAX_TOLD} more" if len(different) > MAX_TOLD else ""
    return (
        f"the spill of iteration {record.span.iteration} is of another run: {', '.join(told)}{more}"
        "; start with what it was made with, or afresh with another --moetion-dir"
    )
