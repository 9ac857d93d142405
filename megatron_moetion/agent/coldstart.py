"""The start of a job: which spill, or checkpoint of the host, all nodes can go on from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moetion.agent.fallback import AFRESH, Limit, Source, Stored
from megatron_moetion.agent.membership import KeyValues, Members, all_have_read
from megatron_moetion.patch_location import load_patches
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


class CheckpointsDiffer(RuntimeError):
    """The nodes see different checkpoints of the host; one line with what to do."""


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
class Start:
    """What a job starts from.

    Attributes:
        source: a spill, the host's own checkpoint, or `AFRESH`.
        record: of the spill, this node's.
    """

    source: Source = AFRESH
    record: Record | None = None


@dataclass(frozen=True)
class ColdStart:
    """Finds what all nodes can go on from, and loads it if it is a spill.

    Args:
        root: folder of all spills on this node; nodes may share it or not. None without spills.
        members: all nodes.
        share: see `Share`.
        checkpoint: iteration of the host's own checkpoint that the job would load, if any.
        limit: what may be taken where the job begins again; node 0's counts for all.
    """

    root: Path | None
    members: Members
    share: Share
    checkpoint: int | None
    limit: Limit | None = None

    def take(self, store: VaultStore) -> Start:
        """Load a spill into the store, if it is one, and say in one line what the job starts from.

        Raises:
            SpillDoesNotFit: it was made on other nodes or ranks.
            NoSpillLeft: training would begin afresh though it had come further.
            CheckpointsDiffer: the host would not load the same on every node.
        """
        own = self.members.own.node_rank
        names = [] if self.root is None else spill.names(self.root, own)
        limit = None if self.limit is None else self.limit.to_json()
        said = self.share("spills", [names, self.checkpoint, limit])
        held = set.intersection(*(set(names) for names, _, _ in said))
        # An agent that has just come to a job that begins again knows of no limit.
        _, checkpoint, limit = said[0]
        seen = [checkpoint for _, checkpoint, _ in said]
        may = Limit.from_json(limit).allows if limit is not None else lambda _: True
        loads = None if checkpoint is None else Source(checkpoint, False)
        loads = loads if loads is not None and may(loads) else None
        for name in sorted(held, reverse=True):
            source = Source(spill.iteration_of(name), True)
            if not may(source):
                continue
            if loads is not None and loads > source:
                _agree(seen)
                newer = f"the checkpoint of iteration {checkpoint} is newer"
                self._say(f"not started from the spill of iteration {source.iteration}: {newer}")
                return Start(loads)
            record = self._load(name, store)
            if record is not None:
                older = "" if checkpoint is None else f"; the checkpoint is of {checkpoint}"
                self._say(f"starting from {source} in {self.root}{older}")
                return Start(source, record)
        _agree(seen)
        return self._without_spill(loads, begun=bool(held) or limit is not None)

    def _without_spill(self, loads: Source | None, begun: bool) -> Start:
        """Leaves it to the host.

        Args:
            loads: what it would load.
            begun: there were spills, or the job begins again.
        """
        none = "" if self.root is None else f"no valid spill in {self.root}: "
        if loads is not None:
            self._say(f"{none}--load of iteration {loads.iteration}")
            return Start(loads)
        if begun:
            none = "" if self.root is None else f"no spill in {self.root} is sound, and "
            raise NoSpillLeft(
                f"{none}--load names no Megatron checkpoint: give one, or start afresh with another"
                " --moetion-dir"
            )
        if none:
            self._say(f"{none}a fresh start")
        return Start()

    def _load(self, name: str, store: VaultStore) -> Record | None:
        """One spill, if it is good on every node."""
        error, record, fits = "", None, True
        assert self.root is not None
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


def _agree(checkpoints: Sequence[int | None]) -> None:
    """Of ranks that load and others that begin afresh, or that load something else, nothing good
    comes.
    """
    other = next((n for n, seen in enumerate(checkpoints) if seen != checkpoints[0]), None)
    if other is None:
        return
    first, second = (
        "none" if seen is None else f"that of iteration {seen}"
        for seen in (checkpoints[0], checkpoints[other])
    )
    raise CheckpointsDiffer(
        f"of the Megatron checkpoints that --load names node 0 sees {first} and node {other}"
        f" {second}: give a folder that all nodes share"
    )


def stored(spills: Path | None, node_rank: int, script_args: Sequence[str]) -> Stored:
    """What this node finds on disk now.

    Args:
        spills: folder of all spills on this node; None without them.
        script_args: what the workers are given.
    """
    names = [] if spills is None else spill.names(spills, node_rank)
    checkpoint = load_patches("checkpoint").newest(script_args)
    return Stored(tuple(map(spill.iteration_of, names)), checkpoint)


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
