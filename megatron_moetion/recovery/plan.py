"""The recovery plan: a pure function of what survivors report and what the vaults hold.

Every rank computes it from the same facts; equal digests prove that they agree (design section 7).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from megatron_moetion.parts import Part, complete
from megatron_moetion.recovery.edges import Unfed, newest_bases
from megatron_moetion.topology import Topology


class Progress(StrEnum):
    """How far a rank is inside its current iteration. The order of members is the order of time."""

    BEFORE_COMMIT = "before-commit"
    STEPPING = "stepping"
    AFTER_STEP = "after-step"
    RETURNED = "returned"

    @property
    def order(self) -> int:
        return list(Progress).index(self)


@dataclass(frozen=True)
class Position:
    """Where a rank is.

    Attributes:
        iteration: the iteration it is in (or just returned from); 0 before the first.
        progress: how far inside it.
        committed: the newest iteration whose commit point it has passed.
        logged: the newest iteration whose log line it has written.
        since: the oldest iteration of which what it sent is in the log of its node; it is not 0
            where another node took the place of a lost one.
        ended: (iteration, n): it has been through the first n interludes after that iteration, and
            through all of earlier ones. It never goes back, also where an iteration is run again.
        told: likewise, of which it has written what they say.
        gathered: it has all parameters of its stage as of its last update, under the shard cut.
    """

    iteration: int = 0
    progress: Progress = Progress.RETURNED
    committed: int = 0
    logged: int = 0
    since: int = 0
    ended: tuple[int, int] = (0, 0)
    told: tuple[int, int] = (0, 0)
    gathered: bool = True

    def to_json(self) -> dict[str, object]:
        return {
            "iteration": self.iteration,
            "progress": self.progress.value,
            "committed": self.committed,
            "logged": self.logged,
            "since": self.since,
            "ended": list(self.ended),
            "told": list(self.told),
            "gathered": self.gathered,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Position:
        numbers = {k: int(str(data[k])) for k in ("iteration", "committed", "logged", "since")}
        ended, told = (_pair(data[k]) for k in ("ended", "told"))
        progress, gathered = Progress(str(data["progress"])), bool(data["gathered"])
        return cls(progress=progress, ended=ended, told=told, gathered=gathered, **numbers)


def _pair(value: Any) -> tuple[int, int]:
    iteration, count = value
    return int(iteration), int(count)


@dataclass(frozen=True)
class FrameInfo:
    """What the plan needs to know of a sealed frame; `skipped` operators are not in it.

    `light` are the operators of which it holds compute weights or, under the shard cut, gradients.
    """

    iteration: int
    full: frozenset[Part]
    light: frozenset[str]
    skipped: frozenset[str] = frozenset()
    stepped: bool = True

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> FrameInfo:
        full = frozenset(Part.from_json(row) for row in meta["full"])
        light, skipped = frozenset(meta["light"]), frozenset(meta["skipped"])
        return cls(meta["iteration"], full, light, skipped, meta["stepped"])

    @property
    def operators(self) -> frozenset[str]:
        return self.light | self.skipped | {part.operator for part in self.full}


@dataclass(frozen=True)
class Facts:
    """The input of a plan.

    Attributes:
        epoch: generation of the process groups that the recovery creates.
        committed: the iteration that counts as done everywhere.
        dead: global ranks that are rebuilt by replacements.
        positions: last known position of every rank; a dead rank's is the one it reported last.
        frames: sealed frames of every rank, ascending by iteration.
        starts: of each rank whose position went with its node, the iterations that it can begin.
        logged: of every rank with a position, the oldest iteration of which what it sent over
            stage edges is still in its log; 0 for one that is not named.
        cut: that the frames were captured for; empty where there are none.
        doubted: a rebuild has led to results that the host rejects, so frames are looked through.
    """

    epoch: int
    committed: int
    dead: tuple[int, ...]
    positions: Mapping[int, Position]
    frames: Mapping[int, tuple[FrameInfo, ...]]
    starts: Mapping[int, frozenset[int]] = field(default_factory=dict)
    logged: Mapping[int, int] = field(default_factory=dict)
    cut: str = ""
    doubted: bool = False

    @property
    def lost(self) -> frozenset[int]:
        """Dead ranks of which nothing is left but what was copied to other nodes."""
        return frozenset(self.dead) - self.positions.keys()


@dataclass(frozen=True)
class StagePlan:
    """How one failed stage is rebuilt.

    Attributes:
        pp_rank: the stage.
        base: the iteration whose frame starts the reconstruction.
        dense_at: the first iteration at which every operator on every rank has full state.
        replay: the iterations that are run again, ascending; empty when the base itself is the end.
    """

    pp_rank: int
    base: int
    dense_at: int
    replay: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What everybody does.

    Attributes:
        epoch: of the process groups that are made.
        committed: the iteration behind which training goes on.
        dead: global ranks that are replaced.
        stages: under the stage cut, an entry for each failed stage; all others wait.
        shards: under the shard cut, (global rank, base) of each rank that rebuilds itself by
            updates; all others keep what they have.
        unfinished: under the shard cut, survivors that were in the committed iteration: they finish
            it but for the gather of their parameters, which is made up for.
    """

    epoch: int
    committed: int
    dead: tuple[int, ...]
    stages: tuple[StagePlan, ...] = ()
    shards: tuple[tuple[int, int], ...] = ()
    unfinished: tuple[int, ...] = ()

    def stage(self, pp_rank: int) -> StagePlan | None:
        return next((s for s in self.stages if s.pp_rank == pp_rank), None)

    @property
    def digest(self) -> str:
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()

    def __str__(self) -> str:
        stages = "; ".join(
            f"stage {s.pp_rank}: base {s.base}, replay "
            + (f"{s.replay[0]}..{s.replay[-1]}" if s.replay else "nothing")
            for s in self.stages
        ) + "; ".join(f"rank {rank}: base {base}" for rank, base in self.shards)
        return f"epoch {self.epoch}, committed {self.committed}, dead {list(self.dead)}: {stages}"


class NothingToRebuildFrom(RuntimeError):
    """No sealed, complete base of a failed stage is left."""


def needs_result(position: Position, committed: int, dead: bool) -> bool:
    """Whether a rank of a failed stage must run the committed iteration again to have what it
    returns.

    A survivor past its optimizer step is paused inside that iteration and will return from it by
    itself.
    """
    if committed == 0 or position.iteration != committed:
        return False
    done = Progress.RETURNED if dead else Progress.AFTER_STEP
    return position.progress.order < done.order


def dense_from(frames: Sequence[FrameInfo], base: int, last: int) -> int | None:
    """Where a reconstruction from `base` becomes dense, or None if it never does up to `last`.

    Walks consecutive frames. At each, an operator must have all parts there or have got the last of
    them before, or be there in light form.
    """
    by_iteration = {f.iteration: f for f in frames}
    parts: frozenset[Part] = frozenset()
    for iteration in range(base, last + 1):
        frame = by_iteration.get(iteration)
        if frame is None:
            return None
        parts |= frame.full
        rest = frame.operators - complete(parts)
        if not rest:
            return iteration
        if rest - frame.light:
            return None
    return None


def bases(frames: Sequence[FrameInfo], last: int) -> dict[int, int]:
    """All bases that one rank could start from, with the iteration at which each becomes dense."""
    dense = {f.iteration: dense_from(frames, f.iteration, last) for f in frames}
    return {base: dense_at for base, dense_at in dense.items() if dense_at is not None}


def _candidates(facts: Facts, ranks: Sequence[int], last: int) -> dict[int, int]:
    """Bases that all ranks of a stage share, each with where the stage becomes dense."""
    shared: dict[int, int] | None = None
    for rank in ranks:
        mine = bases(facts.frames.get(rank, ()), last)
        if shared is None:
            shared = mine
        else:
            shared = {b: max(shared[b], mine[b]) for b in shared.keys() & mine.keys()}
    return shared or {}


def _must_replay(facts: Facts, ranks: Sequence[int]) -> bool:
    """Whether the committed iteration itself has to run again on this stage."""
    dead = set(facts.dead)
    return any(needs_result(entered(facts, r), facts.committed, r in dead) for r in ranks)


def _stage_bases(facts: Facts, topology: Topology, pp_rank: int) -> dict[int, int]:
    """The bases that a failed stage has, each with where it becomes dense; at least one."""
    ranks = topology.stage(pp_rank)
    last = facts.committed - 1 if _must_replay(facts, ranks) else facts.committed
    candidates = _candidates(facts, ranks, last)
    logging = any(entered(facts, r).iteration == facts.committed for r in facts.dead if r in ranks)
    if max(candidates, default=-1) == facts.committed and logging:
        # A replacement that is about to log needs one iteration to learn what is logged.
        candidates = _candidates(facts, ranks, facts.committed - 1) or candidates
    begun = {rank: _begun(facts, rank) for rank in facts.lost.intersection(ranks)}
    oldest = max(begun.values(), default=0) - 1
    candidates = {base: dense for base, dense in candidates.items() if base >= oldest}
    if not candidates:
        held = {r: [f.iteration for f in facts.frames.get(r, ())] for r in ranks}
        copied = f"; copies of what iterations begin with by rank: since {begun}" if begun else ""
        raise NothingToRebuildFrom(
            f"stage {pp_rank} cannot be rebuilt at iteration {facts.committed}: no complete set of "
            f"frames is left (sealed frames by rank: {held}{copied})"
        )
    return candidates


def _begun(facts: Facts, rank: int) -> int:
    """The oldest iteration from which on a lost rank can begin each one up to the committed one."""
    oldest, starts = facts.committed + 1, facts.starts.get(rank, frozenset())
    while oldest - 1 in starts:
        oldest -= 1
    return oldest


def _senders(facts: Facts, topology: Topology, pp_rank: int) -> dict[int, int | None]:
    """From which iteration on what entered a stage is in the logs of each neighbour; None where
    some of it is lost.
    """
    lost, found = facts.lost, dict[int, int | None]()
    for sender in topology.senders(pp_rank):
        stage, known = topology.pp_ranks[sender], facts.logged.get(sender, 0)
        before = found.get(stage, 0)
        found[stage] = None if sender in lost or before is None else max(before, known)
    return found


def make_plan(facts: Facts, topology: Topology) -> Plan:
    """Decides which stages replay what.

    Raises:
        NothingToRebuildFrom: when a failed stage has no complete base on all of its ranks, or what
            entered it is lost.
    """
    failed = sorted(topology.stages_of(facts.dead))
    begins = {entered(facts, rank).iteration for rank in facts.lost}
    late = [r for r, p in facts.positions.items() if p.iteration == facts.committed]
    if facts.committed + 1 in begins and late:
        raise NothingToRebuildFrom(
            f"ranks {late} are in iteration {facts.committed}, which ranks {sorted(facts.lost)} "
            "cannot begin: what they began it with was not copied to other nodes"
        )
    dense = {pp_rank: _stage_bases(facts, topology, pp_rank) for pp_rank in failed}
    edges = {
        (pp_rank, sender): since
        for pp_rank in failed
        for sender, since in _senders(facts, topology, pp_rank).items()
    }
    try:
        chosen = newest_bases(_foresighted(facts, topology, dense), edges)
    except Unfed:
        try:
            chosen = newest_bases(dense, edges)
        except Unfed as error:
            raise NothingToRebuildFrom(
                f"stage {error.pp_rank} cannot be rebuilt at iteration {facts.committed}: what "
                f"stage {error.sender} sent it is in no log any more"
            ) from None
    stages = tuple(
        StagePlan(pp_rank, base, dense[pp_rank][base], tuple(range(base + 1, facts.committed + 1)))
        for pp_rank, base in sorted(chosen.items())
    )
    return Plan(facts.epoch, facts.committed, tuple(sorted(facts.dead)), stages)


def _foresighted(
    facts: Facts, topology: Topology, dense: Mapping[int, Mapping[int, int]]
) -> dict[int, list[int]]:
    """Bases, but of a stage whose log is lost only those from which on it logs all that its
    neighbours need if they are the next to fail: then copies of theirs may lag, too.
    """
    lost, wanted = topology.stages_of(facts.lost), dict[int, list[int]]()
    for pp_rank, candidates in dense.items():
        near = topology.stages_of(topology.senders(pp_rank)) - dense.keys()
        theirs = [_candidates(facts, topology.stage(n), facts.committed - 2) for n in near]
        oldest = min((max(each) for each in theirs if each), default=facts.committed)
        early = [base for base in candidates if base <= oldest]
        wanted[pp_rank] = early if early and pp_rank in lost else list(candidates)
    return wanted


def commit_point(positions: Iterable[Position]) -> int:
    """The committed iteration: the furthest that any survivor has passed (design section 6)."""
    return max((p.committed for p in positions), default=0)


def has_result(position: Position, committed: int, by_shard: bool) -> bool:
    """Whether the training step that a dead rank was in is not run by its replacement as usual, as
    its result is in the log or comes from a replay.
    """
    if by_shard:
        return position.progress is Progress.RETURNED
    return position.iteration == committed


def reached(position: Position) -> int:
    """The newest iteration that a rank has been through."""
    return position.iteration - (position.progress is not Progress.RETURNED)


def furthest_through(positions: Iterable[Position]) -> int:
    """The newest iteration that any rank has been through, be it that it went back since, as in an
    attempt at a recovery that another failure ended.
    """
    return max(max(reached(position), position.ended[0] - 1) for position in positions)


def shard_base(frames: Sequence[FrameInfo], at: int) -> int | None:
    """The newest iteration from whose frame on a rank can rebuild its state of `at`, or None.

    Walks consecutive frames. In each, an operator must be there in full, or with its gradient if
    any of it was there before; an iteration without an update needs none.
    """
    by_iteration = {f.iteration: f for f in frames}
    for base in sorted((i for i in by_iteration if i <= at), reverse=True):
        parts: frozenset[Part] = frozenset()
        for iteration in range(base, at + 1):
            frame = by_iteration.get(iteration)
            if frame is None:
                break
            known = {part.operator for part in parts} if frame.stepped else set()
            if known - complete(frame.full) - frame.light:
                break
            parts |= frame.full
        else:
            if by_iteration[at].operators <= complete(parts):
                return base
    return None


def make_shard_plan(facts: Facts) -> Plan:
    """Decides at which iteration training goes on, and who has to rebuild its state of then.

    It is the committed one if all ranks that died have frames up to it: the frame of an iteration
    is sealed once what its training step returned is logged. Survivors that are still in it finish
    it. Otherwise it is the newest that everybody has frames for, and all make later updates undone.

    Where a rank is lost with its log, others may wait in the end of an iteration for what only that
    log had, so training does not go on behind one that somebody has not returned from.

    Raises:
        NothingToRebuildFrom: there is no such iteration.
    """
    dead, survivors = set(facts.dead), facts.positions.keys() - set(facts.dead)
    newest = facts.committed
    if facts.lost:
        newest = min(reached(position) for position in facts.positions.values())
    for at in range(newest, -1, -1):
        if any(at + 1 not in starts for starts in facts.starts.values()):
            continue
        further = survivors if at < facts.committed else set()
        ranks = sorted(further | dead)
        bases = [(rank, shard_base(facts.frames.get(rank, ()), at)) for rank in ranks]
        found = tuple((rank, base) for rank, base in bases if base is not None)
        if len(found) == len(ranks):
            unfinished = () if further else tuple(sorted(_unfinished(facts, survivors)))
            return Plan(facts.epoch, at, tuple(sorted(dead)), (), found, unfinished)
    held = {r: [f.iteration for f in frames] for r, frames in sorted(facts.frames.items())}
    raise NothingToRebuildFrom(
        f"no iteration up to {newest} can be rebuilt: no complete set of frames is left (sealed "
        f"frames by rank: {held})"
    )


def _unfinished(facts: Facts, survivors: Iterable[int]) -> Iterator[int]:
    """Survivors that may lack parameters: a device may be behind the place that its rank has told,
    but not where a training step has returned, as its small talk waits for the device.
    """
    for rank in survivors:
        position = facts.positions[rank]
        inside = position.progress is not Progress.RETURNED
        if (position.iteration == facts.committed and inside) or not position.gathered:
            yield rank


def entered(facts: Facts, global_rank: int, by_shard: bool = False) -> Position:
    """Where a replacement enters training: where its predecessor was last.

    Where nobody knows that, under the shard cut in the iteration behind the one that counts as
    done. Under the stage cut in the one that counts as done itself, right behind its commit point:
    the others may wait in it for its small talk. At the start of a job there is nothing in it.

    Under the shard cut a frame of the iteration that counts as done proves that it had returned
    from it, also where it could not tell any more.

    Raises:
        NothingToRebuildFrom: see `make_shard_plan`.
    """
    at = make_shard_plan(facts).committed if by_shard else facts.committed
    known = facts.positions.get(global_rank)
    if known is not None:
        if by_shard and global_rank in facts.dead and known.iteration <= at:
            return replace(known, iteration=at, progress=Progress.RETURNED, committed=at)
        return known
    if not by_shard and all(at in facts.starts.get(rank, ()) for rank in facts.lost):
        return Position(at, Progress.STEPPING, at, at - 1, ended=(at, 0))
    return Position(at + 1, Progress.BEFORE_COMMIT, at, at, ended=(at + 1, 0))
