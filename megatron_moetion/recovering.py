"""What this rank does when a peer is lost, from the first error until training goes on.

It regroups with all others, carries out its part of the plan, and begins again when yet another
failure comes in between. It decides nothing about plans, and does not run what comes after: it
hands back how training goes on.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in its stubs

from megatron_moetion.capturing import Capturing
from megatron_moetion.holdings import holdings
from megatron_moetion.inbox.key import HeaderKey, ResultKey
from megatron_moetion.inbox.tap import BoundaryTap, CollectiveTap, Mode
from megatron_moetion.progress import RECOVERY
from megatron_moetion.recovery.failure import (
    Interrupted,
    MissingFromInbox,
    Superseded,
    is_communication_error,
)
from megatron_moetion.recovery.plan import (
    Facts,
    NothingToRebuildFrom,
    Plan,
    Position,
    Progress,
    StagePlan,
    entered,
    furthest_through,
    make_plan,
    make_shard_plan,
)
from megatron_moetion.recovery.rebuild import Frames, Rebuild, rebuild_shard
from megatron_moetion.recovery.remade import Remade
from megatron_moetion.replaying import Replay
from megatron_moetion.standing import Standing
from megatron_moetion.vault import CorruptEntry, Unreachable
from megatron_moetion.worker import Worker

RETURNED = Progress.RETURNED.order
UNTIL_QUIET = 3
"""Iterations after a recovery until nothing of what was there before it is left."""


class Resumed(NamedTuple):
    """How training goes on after a recovery.

    Attributes:
        next: the iteration to run next, where that has changed.
        result: a one-tuple with what a replay that went on as the live iteration has returned.
    """

    next: int | None = None
    result: tuple[Any] | None = None


class Recovering:
    """One rank in recoveries, one after the other.

    Args:
        worker: whose session this is.
        standing: of this rank.
        capturing: of its frames.
        collectives: looks groups up, which a recovery makes anew.
        boundaries: feeds a replay.
    """

    def __init__(
        self,
        worker: Worker,
        standing: Standing,
        capturing: Capturing,
        collectives: CollectiveTap,
        boundaries: BoundaryTap,
    ) -> None:
        self._worker, self._standing, self._capturing = worker, standing, capturing
        self._job, self._topology, self._host = worker.job, worker.topology, worker.host
        self._steering, self._by_shard = worker.steering, worker.by_shard
        self._cursor, self._log = worker.cursor, worker.log
        self._collectives, self._boundaries = collectives, boundaries
        self._frames = Frames(worker.host, worker.job.vault, worker.job.global_rank)
        self._replay: Replay | None = None
        self._undone_to = sys.maxsize
        """Between two attempts: the iteration that this rank went back to."""
        self._resumed_at: int | None = None
        """The iteration that counted as done in the newest recovery."""

    def in_doubt(self, iteration: int) -> bool:
        """Whether what an iteration computes comes right out of state that was rebuilt."""
        return self._resumed_at is not None and iteration <= self._resumed_at + 1

    def begin(self, iteration: int) -> None:
        """An iteration begins: what is still held is told once a recovery is long over."""
        if self._resumed_at is not None and iteration == self._resumed_at + UNTIL_QUIET:
            # While one is left alone, the groups of its time are kept.
            alone, epoch = self._job.groups.waits.num_alone(), self._standing.epoch
            self._job.events.emit("holds", epoch=epoch, left_alone=alone, **holdings())

    def replayed(self, iteration: int) -> None:
        """See `Replay.stepped`."""
        assert self._replay is not None
        self._replay.stepped(iteration)

    def recover(self, error: Exception, newest: int) -> Resumed:
        """A survivor goes through the recovery that explains an error.

        Args:
            newest: the newest iteration that this rank has begun.
        """
        self._job.progress.recovers()
        with self._job.progress.aside(RECOVERY):
            while True:
                epoch = self._standing.failure(error)
                self._job.injector.reach("planning", self._standing.position.iteration)
                try:
                    self._job.notices.wait("abort", epoch)
                    # What was captured counts for the plan, and its sources are about to be
                    # rebuilt.
                    self._capturing.drain()
                    self._job.send("quiesced", epoch=epoch)
                    return self._carry_out(self._job.receive_facts(epoch), newest)
                except Exception as again:
                    self._only_superseded(again, epoch)

    def _only_superseded(self, error: Exception, epoch: int) -> None:
        """Passes when recovery was cut short by another failure or a damaged entry, to be begun
        again under another epoch; anything else is raised again.

        What is missing may be so by a failure that is not known here yet: the leader says.
        """
        # The traceback holds groups that were given up, with their threads and connections.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, Superseded):
            return
        if isinstance(error, CorruptEntry):
            damaged = {"global_rank": error.global_rank, "key": error.key, "reason": str(error)}
            self._job.send("damaged", epoch=epoch, **damaged)
        elif isinstance(error, (MissingFromInbox, NothingToRebuildFrom)):
            self._job.hopeless(str(error), epoch)
        # Only here: past its commit point a survivor must not give its iteration up for that.
        elif not (isinstance(error, Unreachable) or is_communication_error(error)):
            raise error
        self._job.notices.failure(error, epoch)
        self._host.reset_after_abort()

    def take_up(self, iteration: int) -> Position:
        """A replacement stands where the dead worker was, in this iteration."""
        facts = self._job.facts
        assert facts is not None
        self._job.progress.at(RECOVERY, iteration)
        position = self._enter(facts, iteration)
        self._standing.take_up(position)
        self._standing.learn(facts)
        return position

    def join(self, last: Position, iteration: int) -> Resumed:
        """A replacement goes through the recovery that it is there for.

        Args:
            last: what `take_up` found.
            iteration: that the host's loop is in.
        """
        facts = self._job.facts
        assert facts is not None
        while True:
            try:
                return self._carry_out(facts, last.iteration)
            except Exception as error:
                self._only_superseded(error, facts.epoch)
            facts = self._next_facts(facts.epoch)
            now = self._enter(facts, iteration)
            lost, was_inside = self._job.global_rank in facts.lost, last.progress.order < RETURNED
            # Where the data iterator stands was settled before.
            behind = self._by_shard and was_inside and now.progress.order == RETURNED
            if (lost and now.iteration != iteration) or behind:
                raise RuntimeError(f"the job does not go on in iteration {iteration} any more")

    def _enter(self, facts: Facts, iteration: int) -> Position:
        """Where a replacement takes up the work of its predecessor, which may have gone with its
        node.
        """
        if self._job.global_rank in facts.positions:
            return entered(facts, self._job.global_rank, self._by_shard)
        if self._by_shard:
            # Other facts may have come since the host was told where to begin.
            before = iteration - 1
            ended = (iteration, 0)
            known = Position(iteration, Progress.BEFORE_COMMIT, before, before, ended=ended)
        else:
            known = entered(facts, self._job.global_rank)
        self._capturing.complete_behind = known.committed
        return known

    def _next_facts(self, epoch: int) -> Facts:
        epoch = self._job.notices.failure(Interrupted("superseded"), epoch)
        facts = self._job.receive_facts(epoch)
        self._standing.learn(facts)
        return facts

    def _carry_out(self, facts: Facts, newest: int) -> Resumed:
        """Regroup, rebuild if this stage failed, and wait until everybody can go on."""
        plan = self._plan(facts)
        self._regroup(plan)
        self._job.injector.reach("restore", plan.committed)
        self._cursor.refeed = plan.committed
        # What is captured in a replay is of the state that training goes on from.
        self._log.epoch = plan.epoch
        if self._by_shard:
            # Training may go on before what some have been through.
            self._cursor.refeed = furthest_through(facts.positions.values())
            self._go_back(plan, newest)
            return Resumed(next=plan.committed + 1)
        stage = plan.stage(self._topology.pp_rank)
        if stage is None:
            self._joined(plan)
            return Resumed()
        since = stage.base + 1
        if self._job.global_rank not in facts.lost:
            since = min(self._standing.position.since, since)
        return Resumed(result=self._walk(plan, stage, since))

    def _plan(self, facts: Facts) -> Plan:
        # What was told before this session began has called off nothing here.
        self._job.notices.only_before(facts.epoch)
        plan = make_shard_plan(facts) if self._by_shard else make_plan(facts, self._topology)
        self._job.events.emit("planned", epoch=plan.epoch, plan=str(plan), digest=plan.digest)
        self._job.injector.reach("regroup", plan.committed)
        self._frames.doubted = facts.doubted
        return plan

    def _regroup(self, plan: Plan) -> None:
        job = self._job
        swapped = job.groups.rebuild(
            plan.epoch, job.connect_store, lambda: job.init_world(plan.epoch)
        )
        self._collectives.forget()
        self._agree(plan)
        job.events.emit("regrouped", epoch=plan.epoch, swapped=swapped)

    def _agree(self, plan: Plan) -> None:
        """Plans are pure; that all ranks made the same one is still checked, not assumed."""
        assert self._job.store is not None
        store = PrefixStore(f"moetion/plan/{plan.epoch}", self._job.store)
        agreed = store.compare_set("digest", "", plan.digest).decode()
        if agreed != plan.digest:
            raise RuntimeError(
                f"recovery plans differ between ranks: {agreed} and {plan.digest} ({plan})"
            )

    def _walk(self, plan: Plan, stage: StagePlan, since: int) -> tuple[Any] | None:
        """The stage cut: see `Replay.run`.

        Args:
            since: see `Standing.logs_since`.
        """
        job = self._job
        assert job.store is not None
        store = PrefixStore(f"moetion/sent/{plan.epoch}", job.store)
        self._boundaries.begin_replay(
            Remade(plan, self._topology, job.vault, store, job.groups.waits)
        )
        rebuild = Rebuild(stage, self._host, self._frames, self._log, self._capturing.capture)
        joined = partial(self._joined, plan, replayed=len(stage.replay), since=since)
        self._replay = Replay(self._worker, self._standing, plan, stage, rebuild, joined)
        try:
            return self._replay.run()
        finally:
            self._replay = None

    def _go_back(self, plan: Plan, newest: int) -> None:
        """The shard cut: brings this rank to the start of the iteration behind the one that counts
        as done.
        """
        at, bases = plan.committed, dict(plan.shards)
        base = bases.get(self._job.global_rank)
        if at > self._undone_to:
            # Copies may come in between two attempts. What is undone here is for good.
            raise RuntimeError(f"this rank went back to {self._undone_to}, before iteration {at}")
        was, self._undone_to = self._standing.position, at
        gathers = {*bases, *plan.unfinished}
        if not gathers.isdisjoint(self._topology.stage(self._topology.pp_rank)):
            self._rebuild_shards(base, at)
        if base is not None:
            state = self._log.read_state(HeaderKey(at + 1) if newest > at else ResultKey(at))
            if state is not None:
                self._steering.load_state(state["steering"])
        if was.iteration > at:
            before = Progress.BEFORE_COMMIT
            self._standing.move(replace(was, iteration=at + 1, progress=before, committed=at))
        told = {"from": was.iteration, "iteration": at, "base": base}
        self._job.events.emit("went-back", epoch=plan.epoch, **told)
        self._joined(plan)

    def _rebuild_shards(self, base: int | None, at: int) -> None:
        """Rebuilds what is to be rebuilt in this stage, and gathers its parameters."""
        mode, progress = self._cursor.mode, self._cursor.progress
        self._cursor.mode, self._cursor.progress = Mode.REPLAY, Progress.BEFORE_COMMIT
        try:
            self._host.begin_replay()
            if base is not None:
                began = time.perf_counter()
                num_updates = rebuild_shard(self._host, self._frames, self._log, base, at)
                ms = (time.perf_counter() - began) * 1000
                told = {"base": base, "updates": num_updates, "ms": ms}
                self._job.events.emit("rebuilt", iteration=at, **told)
            self._host.sync_params()
            self._standing.gathered(True)
            self._host.end_replay()
        finally:
            self._cursor.mode, self._cursor.progress = mode, progress

    def _joined(self, plan: Plan, replayed: int = 0, since: int | None = None) -> None:
        """State is as it is to be on this rank; returns when it is on all others.

        Args:
            replayed: so many iterations.
            since: see `Standing.logs_since`; None where this stage was not rebuilt.
        """
        self._job.injector.reach("resume", plan.committed)
        if since is not None:
            # Whoever fails from here on has been somewhere, also on a node that has just begun.
            self._standing.logs_since(since)
        rebuilt = since is not None or self._job.global_rank in dict(plan.shards)
        told = {"iteration": plan.committed, "digest": plan.digest, "replayed": replayed}
        self._job.send("joined", epoch=plan.epoch, rebuilt=rebuilt, **told)
        self._job.notices.wait("resume", plan.epoch)
        self._undone_to = sys.maxsize
        self._standing.resumed(plan.epoch)
        told = {"replayed": replayed, "iteration": plan.committed}
        self._job.events.emit("resumed", epoch=plan.epoch, **told)
        self._resumed_at = plan.committed
