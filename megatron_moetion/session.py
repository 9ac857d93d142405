"""One worker's training session: the order of things in a training step, and what happens when a
peer is lost.

The session decides nothing about state or plans; it moves the cursor, calls capture, and walks a
plan.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in its stubs

from megatron_moetion.claiming import claim_of, logs_of
from megatron_moetion.holdings import holdings
from megatron_moetion.host import Host, State
from megatron_moetion.inbox.key import FrameKey, HeaderKey, ResultKey
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.inbox.tap import BatchTap, BoundaryTap, CollectiveTap, Cursor, Mode
from megatron_moetion.interlude import Interludes
from megatron_moetion.job import Job, Notice
from megatron_moetion.progress import BETWEEN, PLACES, RECOVERY, REPLAY
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
    has_result,
    make_plan,
    make_shard_plan,
    needs_result,
    reached,
)
from megatron_moetion.recovery.rebuild import Frames, Rebuild, rebuild_shard
from megatron_moetion.recovery.remade import Remade
from megatron_moetion.schedule import FramePlan, Schedule
from megatron_moetion.snapshot.copier import Ticket, copier_for
from megatron_moetion.snapshot.frame import layout, operator_ends, poison, sources, to_meta
from megatron_moetion.steering import Steering
from megatron_moetion.topology import Topology
from megatron_moetion.vault import CorruptEntry
from megatron_moetion.vault.arena import size_class
from megatron_moetion.vault.budget import frame_bytes, staged_bytes
from megatron_moetion.vault.spill import Span

RETURNED = Progress.RETURNED.order
UNTIL_QUIET = 3
"""Iterations after a recovery until nothing of what was there before it is left."""


class Undone(Exception):
    """The iteration that this rank has made its update in does not count any more."""


class StopReplay(Exception):
    """Ends a replayed training step after its optimizer step: this rank, or its predecessor, has
    been through the rest of it.
    """


class Session:
    """Protects the training steps of one worker.

    Two threads meet here: training, and the listener of the agent's notices. `_lock` guards the
    position and the freeze: a commit point is passed either before a freeze or not at all.
    """

    def __init__(self, job: Job, topology: Topology, host: Host, steering: Steering) -> None:
        self.job, self.topology, self.host, self.steering = job, topology, host, steering
        self._by_shard = job.config.cut == "shard"
        self.cursor = Cursor(replays=not self._by_shard)
        self.log = InboxLog(job.vault, job.global_rank, host.device)
        self.collectives = CollectiveTap(self.cursor, self.log, topology, job.groups, self)
        self.boundaries = BoundaryTap(self.cursor, self.log, topology)
        self.batches = BatchTap(self.cursor, self.log)
        self.interludes = Interludes(self.cursor, self.log, host, job.groups.waits, self)
        self.frames = Frames(host, job.vault, job.global_rank)
        self.copier = copier_for(host.device, self._seal_failed)
        self._frame: Ticket | None = None
        self._unsealed: tuple[str, Callable[[], None]] | None = None
        self._operators = {o.name: o for o in host.operators}
        self._lock = threading.RLock()
        self._position = Position()
        self._frozen = 0
        self._handled = 0
        self._verdict: int | None = None
        self._dead: tuple[int, ...] = ()
        self._settled = True
        self._rebuild: Rebuild | None = None
        self._run_on = False
        self._undone_to = sys.maxsize
        self._offered = self._began_here = self._logs_since = 0
        self._plan: Plan | None = None
        self._result: tuple[Any] | None = None
        self._began: tuple[int, float] | None = None
        self._next = 0
        self._newest = 0
        self._stepped = False
        self._quiet = self._doubtful = self._paused = 0
        self._buffers: tuple[int, dict[str, torch.Tensor]] = (0, {})
        steering.ceiling = job.ceiling
        job.hooks.append(self._on_notice)

    @property
    def position(self) -> Position:
        return self._position

    def _move(self, position: Position) -> None:
        with self._lock:
            self._position = position
            self.cursor.iteration, self.cursor.progress = position.iteration, position.progress
            self.job.send("position", position=position.to_json())
            if position.progress.order >= Progress.AFTER_STEP.order:
                self._settle()

    @property
    def in_doubt(self) -> bool:
        """Whether what this rank computes comes right out of state that was rebuilt from memory,
        its own or its peers'.
        """
        return self.cursor.mode is Mode.REPLAY or self.cursor.iteration <= self._doubtful

    def _settle(self) -> None:
        """Tells once that this rank stands where it is to stand, and not before anybody asks."""
        if self._verdict is not None and not self._settled:
            self._settled = True
            self.job.send("settled", epoch=self._frozen)

    def reached(self, place: str, microbatch: int | None = None) -> None:
        """A place that the agent is to see. A scripted fault may fire here; never in replay."""
        if self.cursor.mode is not Mode.LIVE and not self.interludes.inside:
            self.job.progress.moved()
        else:
            # The gather of step i may run inside iteration i + 1, overlapped with its forward
            # passes.
            gather = place == "param-gather"
            iteration = self._position.committed if gather else self._position.iteration
            self.job.progress.at(place, iteration, microbatch)
            self.job.injector.reach(place, iteration, microbatch)

    def begin(self, iteration: int) -> None:
        """Start of an iteration, first time or again after an abort."""
        self.cursor.counts, self.cursor.closing = Counter(), False
        self.cursor.mode, self.cursor.since = Mode.LIVE, self.log.epoch
        self._drop_unsealed()
        if not self._paused:
            self.job.groups.forget_stale()
        if iteration == self._quiet:
            # While one is left alone, the groups of its time are kept.
            alone = self.job.groups.waits.num_alone()
            self.job.events.emit("holds", epoch=self._handled, left_alone=alone, **holdings())
        # Before anything new is logged: what is claimed at the start counts on that.
        timeline = self.steering.timeline
        self.job.vault.drop(timeline.oldest(iteration))
        if timeline.forget(iteration):
            self.job.vault.trim(self._frame_classes(timeline.newest))
        key = HeaderKey(iteration)
        known = self.log.read_state(key) if iteration <= self._newest else None
        self._newest, self._stepped = max(self._newest, iteration), False
        if known is None:
            self.log_start(iteration, self.host.start_state())
        else:
            self.host.take_over(known)
        self._restore_buffers(iteration)
        # The frame before the last one is sealed for sure.
        self._offer_window(iteration - 2)
        self._time(iteration)
        if self.steering.counts_loads:
            self.host.count_loads()
        ended = max(self._position.ended, (iteration, 0))
        before = Progress.BEFORE_COMMIT
        self._move(replace(self._position, iteration=iteration, progress=before, ended=ended))
        self.reached("start")

    def _restore_buffers(self, iteration: int) -> None:
        """Forward passes and the end of the backward ones change model buffers (tokens that routers
        have counted, their bias): an iteration that is run again begins with those of its start.
        """
        buffers = self.host.buffers()
        began, copies = self._buffers
        if began == iteration:
            with torch.no_grad():
                for name, tensor in buffers.items():
                    tensor.copy_(copies[name])
        else:
            self._buffers = (iteration, {name: t.clone() for name, t in buffers.items()})

    def log_start(self, iteration: int, state: State) -> None:
        """Logs what a replacement needs to begin an iteration.

        Args:
            state: `Host.start_state`.
        """
        self.log.write_state(HeaderKey(iteration), {**state, "steering": self.steering.to_state()})

    def _time(self, iteration: int) -> None:
        if self.job.progress.begin(iteration):
            self.job.events.emit("steady", iteration=iteration)
            self.job.send("steady")
        now, began = time.perf_counter(), self._began
        if began is not None and began[0] == iteration - 1:
            self.steering.pace.iterated(now - began[1])
        self._began = (iteration, now)

    def _frame_classes(self, schedule: Schedule) -> frozenset[int]:
        """Capacities of the chunks that frames lie in."""
        operators, buffer_bytes = self._operators, self.steering.buffer_bytes
        plans = map(schedule.frame_of_slot, range(schedule.window))
        return frozenset(size_class(frame_bytes(p, operators, buffer_bytes)) for p in plans)

    def _offer_window(self, iteration: int) -> None:
        """Keeps the window that ends at `iteration` for the agent, if it is one to be spilled."""
        schedule, every = self.steering.timeline.at(iteration), self.job.config.spill_interval
        if self.job.link is None or not every or iteration <= self._offered:
            return
        if iteration - schedule.window < self._began_here:
            # The node that it began on is lost.
            return
        if not schedule.closes_at(iteration) or schedule.number(iteration) % every:
            return
        self._offered = iteration
        span = Span(iteration - schedule.window + 1, iteration)
        kept = self.job.vault.keep(span.iterations)
        self.job.send("window", span=asdict(span), kept=kept)

    def train_step(self, iteration: int, run: Callable[[], Any]) -> Any:
        """Stands around the host's training step.

        Args:
            iteration: the iteration, from 1.
            run: runs the host's training step once.
        """
        result = self._run_up_to(iteration, run)
        self.job.progress.at(BETWEEN, iteration)
        return result

    def _run_up_to(self, last: int, run: Callable[[], Any]) -> Any:
        """Runs what is next, up to the iteration `last`, and again what is given up; returns what
        the last one returns.

        Args:
            run: runs the host's training step of the last one.
        """
        while True:
            iteration = self._next
            self.begin(iteration)
            try:
                result = run() if iteration == last else self.host.run_step(iteration)
            except Undone:
                self.host.reset_after_abort()
            except Exception as error:
                self._give_up(error)
                if self._result is not None:
                    self._next = last + 1
                    return self._take_result()
            else:
                result = self._finish(iteration, result)
                self._next = iteration + 1
                if iteration == last:
                    return result

    def _finish(self, iteration: int, result: Any) -> Any:
        counts = dict(self.cursor.counts)
        state = {"result": list(result), "state": self.host.start_state(), "counts": counts}
        # What was decided in this iteration, if nobody begins the next one.
        state["steering"] = self.steering.to_state()
        self.log.write_state(ResultKey(iteration), state)
        if self._unsealed is not None:
            _, seal = self._unsealed
            self._unsealed = None
            seal()
        self._move(replace(self._position, progress=Progress.RETURNED))
        self.reached("end")
        return result

    def _take_result(self) -> Any:
        assert self._result is not None
        (result,), self._result = self._result, None
        return result

    def logged(self, iteration: int) -> None:
        """The log line of an iteration has been written."""
        self._move(replace(self._position, logged=iteration))

    def positions(self) -> Iterable[Position]:
        """See `interlude.Gate`."""
        return self.job.facts.positions.values() if self.job.facts is not None else ()

    def ended(self, iteration: int, count: int) -> None:
        """See `interlude.Gate`: before a freeze or not at all, like the commit point."""
        with self._lock:
            if self._frozen:
                raise Interrupted("a peer was lost before this rank was through")
            self._move(replace(self._position, ended=(iteration, count)))

    def told(self, iteration: int, count: int) -> None:
        """See `interlude.Gate`."""
        self._move(replace(self._position, told=(iteration, count)))

    def aside(self, name: str) -> AbstractContextManager[None]:
        """See `interlude.Gate`."""
        return self.job.progress.aside(name if name in PLACES else BETWEEN)

    def hopeless(self, reason: str) -> None:
        """The job ends, or starts anew from a spill."""
        self.job.send("hopeless", reason=reason, state_lost=True)

    def optimizer_step(self, run: Callable[[], Any]) -> Any:
        """Stands around the outermost optimizer's step."""
        if self.cursor.mode is Mode.OFF:
            return run()
        self.collectives.world_passed = False
        if self._frame is not None:
            # The step overwrites what may still be on its way to the host.
            self._frame.wait_on_device()
        iteration = self.cursor.iteration
        self.cursor.closing = self._by_shard
        try:
            result = run()
            if self.cursor.mode is Mode.LIVE and self._position.committed < iteration:
                # There was nothing to update, or too large a gradient.
                self.commit(updates=False)
        finally:
            self.cursor.closing = False
        if self.cursor.mode is Mode.REPLAY:
            self._replayed(iteration)
            return result
        if self._by_shard and iteration <= self.cursor.refeed:
            # Whoever waits behind this iteration may have had its parameters gathered.
            self.update(self.host.sync_params)
        self.capture(iteration, self.steering.timeline.at(iteration).frame(iteration))
        self._move(replace(self._position, progress=Progress.AFTER_STEP))
        return result

    def commit(self, updates: bool = True) -> None:
        """Right before the first parameter changes: every rank holds its final gradients (design
        section 6).

        Args:
            updates: the optimizers make their update now; else it is left out in this iteration.
        """
        iteration = self.cursor.iteration
        self._stepped = updates
        if self.cursor.mode is Mode.REPLAY:
            self.host.drop_frozen_gradients()
            if iteration == self._position.iteration:
                # What was decided before that, this rank knows.
                self.steer()
            return
        if self.cursor.mode is Mode.OFF or self._position.committed == iteration:
            return
        self.steering.loaded(iteration, self.host.take_load())
        self.steer()
        self.collectives.pass_world(self.host.device)
        self.reached("commit")
        with self._lock:
            frozen = self._frozen
            if not frozen:
                self._commit_now()
        if frozen:
            self.await_commit(Interrupted("a peer was lost at the commit point"))
            with self._lock:
                self._commit_now()

    def steer(self) -> None:
        """At the end of a window, agrees on how to capture the next ones. Whatever is told inside a
        stage comes before the collective of the world that all commit behind.
        """
        iteration, timeline = self.cursor.iteration, self.steering.timeline
        if not timeline.at(iteration).closes_at(iteration):
            return
        self.collectives.world_passed = False
        news = self.steering.decide(iteration, self.collectives)
        if news is not None and self.job.global_rank == 0 and self.cursor.mode is Mode.LIVE:
            print(f"moetion: from iteration {iteration + 1} on {news}", flush=True)
        if timeline.newest.first > iteration:
            self.tell_schedule()

    def tell_schedule(self) -> None:
        """For the timeline of events."""
        now = self.steering.timeline.newest
        slots = [[part.to_json() for part in parts] for parts in now.slots]
        fields = {"window": now.window, "policy": now.policy, "split": now.split, "slots": slots}
        self.job.events.emit("scheduled", first=now.first, **fields)

    def _commit_now(self) -> None:
        i, self.cursor.closing = self.cursor.iteration, False
        self._move(replace(self._position, progress=Progress.STEPPING, committed=i))

    def capture(self, iteration: int, plan: FramePlan) -> None:
        """Captures and seals this rank's frame of an iteration."""
        entries = list(sources(plan, self._operators, self.host.buffers()))
        pieces, nbytes = layout(entries)
        key, vault = str(FrameKey(iteration)), self.job.vault
        if self._frame is not None:
            # At most one frame is unsealed: replay may lag by one, and the logs are kept for that.
            self._frame.wait()
        data = vault.reserve(key, nbytes)
        half = len(entries) // 2
        self.copier.copy(entries[:half], pieces[:half], data)
        self.reached("capture")
        self._frame = self.copier.copy(entries[half:], pieces[half:], data)
        meta = {**to_meta(iteration, plan, pieces, self._stepped), "epoch": self.log.epoch}
        meta["cut"] = self.job.config.cut
        ends = operator_ends(pieces, nbytes)
        live, injector = self.cursor.mode is Mode.LIVE, self.job.injector
        damage = live and injector.corrupts(iteration)
        poisoned = live and injector.poisons(iteration)
        copied = self._frame

        def publish() -> None:
            if copied.nbytes:
                self.steering.pace.copied(copied.nbytes, copied.seconds())
            if poisoned:
                poison(pieces, data)
            vault.seal(key, meta, ends)
            if damage:
                data[0] ^= 1

        seal = partial(self.copier.seal, copied, key, publish, partial(vault.abandon, key))
        if self._by_shard and self.cursor.mode is Mode.LIVE:
            # No replay finds out what the training step returns: its frame counts once that is
            # logged.
            self._unsealed = key, seal
            return
        seal()
        if self.cursor.mode is not Mode.LIVE:
            # The starting state, or a replay that is about to overwrite the sources.
            self._frame.wait()

    def _drop_unsealed(self) -> None:
        """The training step that this rank's newest frame is of does not return."""
        if self._unsealed is not None:
            assert self._frame is not None
            self._frame.wait_for_bytes()
            self.job.vault.abandon(self._unsealed[0])
            self._frame = self._unsealed = None

    def update(self, run: Callable[[], Any]) -> Any:
        """See `inbox.tap.Gate`. The optimizer's own part needs nobody, and recovery gathers."""
        try:
            return run()
        except Exception as error:
            if not (self._by_shard and is_communication_error(error)):
                raise
            with self._lock:
                self._position = replace(self._position, gathered=False)
            self.job.notices.failure(error, self._handled)
            # Nothing may be written to the parameters any more.
            self.job.groups.waits.settle()
            return None

    def _seal_failed(self, key: str, error: Exception) -> None:
        self.job.events.emit("seal-failed", key=key, error=str(error))
        text = f"moetion: {key} of global rank {self.job.global_rank} is not sealed: {error}"
        print(text, file=sys.stderr, flush=True)

    def claim_memory(self) -> None:
        """Has this node check that the frames and logs of its ranks fit in its memory.

        Raises:
            MemoryDoesNotFit: without an agent; with one, the agent ends the job.
        """
        steering, timeline = self.steering, self.steering.timeline
        logs = logs_of(self.host, steering, self._by_shard, self.topology.world_size)
        claim = claim_of(self.host, steering, logs, self.job.spills)
        now = timeline.newest
        lag = timeline.kept(now) - now.frames_kept
        self.job.claim_memory(claim, lag)
        steering.ceiling = self.job.ceiling
        granted = claim.with_ceiling(self.job.ceiling)
        self.job.events.emit("claimed", nbytes=granted.need.total, device_bytes=self.device_bytes())

    def device_bytes(self) -> int:
        """Device memory that is taken by one frame on its way, at most; one is at a time. On a CPU
        there is no way to go.
        """
        if self.host.device.type == "cpu":
            return 0
        now = self.steering.timeline.newest
        plans = map(now.frame_of_slot, range(now.window))
        operators, buffer_bytes = self._operators, self.steering.buffer_bytes
        return max(staged_bytes(plan, operators, buffer_bytes) for plan in plans)

    def protect(self, iteration: int) -> None:
        """Takes the dense frame of the starting state: protection begins before the first step."""
        self.capture(iteration, self.steering.timeline.newest.dense)
        self.log_start(iteration + 1, self.host.start_state())
        # Nobody says that it is protected before everybody is. The barrier is small talk already: a
        # rank that fails right behind it leaves its peers paused here, not lost.
        self._position = Position(iteration, Progress.RETURNED, iteration, iteration)
        self.cursor.mode, self.cursor.iteration = Mode.LIVE, iteration
        dist.barrier()
        self._next = self._newest = iteration + 1
        self._move(Position(iteration + 1, Progress.BEFORE_COMMIT, iteration, iteration))

    def _on_notice(self, notice: Notice) -> None:
        op = notice["op"]
        if op == "freeze":
            self.job.groups.cancel(notice["epoch"])
            with self._lock:
                self._frozen, self._verdict, self._settled = notice["epoch"], None, False
                self._dead = tuple(notice["dead"])
                position = self._position
            if self.job.global_rank in self._dead:
                self._abort(notice["epoch"])
            else:
                self.job.send("report", epoch=notice["epoch"], position=position.to_json())
        elif op == "verdict":
            self._on_verdict(notice["epoch"], notice["committed"])
        elif op == "abort":
            self._abort(notice["epoch"])
        elif op == "release":
            self.job.vault.release(Span(**notice["span"]).iterations)
        elif op == "replicated":
            self.steering.pace.replicated(notice["nbytes"], notice["seconds"])

    def _on_verdict(self, epoch: int, committed: int) -> None:
        failed = self._gives_up()
        with self._lock:
            self._verdict = committed
            p = self._position
            finishing = p.iteration == committed and p.progress.order < Progress.AFTER_STEP.order
            if failed or not finishing:
                self._settle()
        # A healthy rank past the commit point goes on inside its stage, under the shard cut on its
        # own; whatever crosses that is cut.
        alone = failed or self._by_shard
        self._abort(epoch, None if alone else self.topology.spans_stages)

    def _gives_up(self) -> bool:
        """Whether this rank leaves the iteration that it is in, wherever it is."""
        failed = self.topology.stages_of(self._dead)
        return not self._by_shard and self.topology.pp_rank in failed

    def _abort(self, epoch: int, crosses: Callable[[tuple[int, ...]], bool] | None = None) -> None:
        self.job.groups.abort(epoch, self.job.store_port, crosses)

    def await_commit(self, error: Exception) -> None:
        """See `inbox.tap.Gate`: a rank at the commit point learns whether others passed it."""
        committed = self._verdict_of(self.job.notices.failure(error, self._handled))
        if committed < self.cursor.iteration or self._gives_up():
            raise Interrupted(f"iteration {self.cursor.iteration} is given up") from error

    def _verdict_of(self, epoch: int) -> int:
        """The committed iteration by the verdict of this epoch, or of a later one."""
        while True:
            try:
                return int(self.job.notices.wait("verdict", epoch)["committed"])
            except Superseded as again:
                epoch = self.job.notices.failure(again, epoch)

    def pause(self, error: Exception) -> None:
        """See `inbox.tap.Gate`: a rank past its step waits inside its collective."""
        with self._lock:
            self._settle()
        saved = self.host.live_state()
        counts, iteration = self.cursor.counts, self.cursor.iteration
        inside = self.cursor.progress is not Progress.RETURNED
        self._recover(error)
        if self._by_shard and self._next <= iteration:
            if inside:
                raise Undone from error
            # Whoever is paused here, and has called that, still knows the groups of before.
            self._paused += 1
            try:
                self._run_up_to(iteration, lambda: self.host.run_step(iteration))
            finally:
                self._paused -= 1
        self.cursor.counts = counts
        if self._by_shard or self._gives_up():
            self.host.load_live_state(saved)
        self.cursor.refeed = max(self.cursor.refeed, self.cursor.iteration)

    def _give_up(self, error: Exception) -> None:
        """The iteration is unwound: recover; then it is run again, or its result is at hand."""
        if not is_communication_error(error):
            raise error
        if self._by_shard and self._position.committed == self._position.iteration:
            # The others count on this rank to have made the update.
            raise error
        self.job.notices.failure(error, self._handled)
        # The traceback holds the activations of the iteration that is given up.
        traceback.clear_frames(error.__traceback__)
        self.host.reset_after_abort()
        self._recover(error)

    def _recover(self, error: Exception) -> None:
        # How long this iteration takes says nothing.
        self._began = None
        self.job.progress.recovers()
        with self.job.progress.aside(RECOVERY):
            while True:
                epoch = self.job.notices.failure(error, self._handled)
                self.job.injector.reach("planning", self._position.iteration)
                try:
                    self.job.notices.wait("abort", epoch)
                    # What was captured counts for the plan, and its sources are about to be
                    # rebuilt.
                    self.copier.drain()
                    self.job.send("quiesced", epoch=epoch)
                    self._carry_out(self.job.receive_facts(epoch))
                    return
                except Exception as again:
                    self._only_superseded(again, epoch)

    def _only_superseded(self, error: Exception, epoch: int) -> None:
        """Passes when recovery was cut short by another failure or a damaged entry, to be begun
        again under another epoch; anything else is raised again.
        """
        # The traceback holds groups that were given up, with their threads and connections.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, Superseded):
            return
        if isinstance(error, CorruptEntry):
            damaged = {"global_rank": error.global_rank, "key": error.key, "reason": str(error)}
            self.job.send("damaged", epoch=epoch, **damaged)
        elif not is_communication_error(error):
            raise error
        self.job.notices.failure(error, epoch)
        self.host.reset_after_abort()

    def join(self, iteration: int) -> Any:
        """A replacement enters training: its first training step is the one the dead worker was in.

        Returns:
            A one-tuple with the step's result, or None when the iteration is to be run as usual.
        """
        facts = self.job.facts
        assert facts is not None
        self.job.progress.at(RECOVERY, iteration)
        last = self._position = self._enter(facts, iteration)
        self._dead = facts.dead
        self.cursor.iteration = self._newest = self._next = last.iteration
        # The data iterator of a replacement begins with this one.
        self.batches.newest = last.iteration + (last.progress is Progress.RETURNED)
        while True:
            try:
                self._carry_out(facts)
                break
            except Exception as error:
                self._only_superseded(error, facts.epoch)
            facts = self._next_facts(facts.epoch)
            now = self._enter(facts, iteration)
            lost, was_inside = self.job.global_rank in facts.lost, last.progress.order < RETURNED
            # Where the data iterator stands was settled before.
            behind = self._by_shard and was_inside and now.progress.order == RETURNED
            if (lost and now.iteration != iteration) or behind:
                raise RuntimeError(f"the job does not go on in iteration {iteration} any more")
        if self._result is not None:
            self._next = iteration + 1
            return (self._take_result(),)
        returned = has_result(last, facts.committed, self._by_shard)
        if self._by_shard and returned and self._next <= iteration:
            self._run_up_to(iteration, lambda: self.host.run_step(iteration))
        if returned:
            self._next = iteration + 1
            state = self.log.read_state(ResultKey(iteration))
            self.host.load_start_state(state["state"])
            self.cursor.mode = Mode.LIVE
            self.cursor.refeed = max(self.cursor.refeed, iteration)
            self.cursor.counts = Counter(state["counts"])
            self._move(self._position)
            return (tuple(state["result"]),)
        return None

    def _enter(self, facts: Facts, iteration: int) -> Position:
        """Where a replacement takes up the work of its predecessor, which may have gone with its
        node.
        """
        if self.job.global_rank in facts.positions:
            return entered(facts, self.job.global_rank, self._by_shard)
        if self._by_shard:
            # Other facts may have come since the host was told where to begin.
            before = iteration - 1
            ended = (iteration, 0)
            known = Position(iteration, Progress.BEFORE_COMMIT, before, before, ended=ended)
        else:
            known = entered(facts, self.job.global_rank)
        self._began_here = known.committed
        return known

    def _next_facts(self, epoch: int) -> Facts:
        epoch = self.job.notices.failure(Interrupted("superseded"), epoch)
        facts = self.job.receive_facts(epoch)
        self._dead = facts.dead
        return facts

    def _carry_out(self, facts: Facts) -> None:
        """Regroup, rebuild if this stage failed, and wait until everybody can go on."""
        # What was told before this session began has called off nothing here.
        self.job.notices.only_before(facts.epoch)
        try:
            plan = make_shard_plan(facts) if self._by_shard else make_plan(facts, self.topology)
        except NothingToRebuildFrom as error:
            self.hopeless(str(error))
            raise
        self.job.events.emit("planned", epoch=plan.epoch, plan=str(plan), digest=plan.digest)
        self.job.injector.reach("regroup", plan.committed)
        self.frames.doubted = facts.doubted
        swapped = self.job.groups.rebuild(
            plan.epoch, self.job.connect_store, lambda: self.job.init_world(plan.epoch)
        )
        self.collectives.forget()
        self._agree(plan)
        self.job.events.emit("regrouped", epoch=plan.epoch, swapped=swapped)
        self.job.injector.reach("restore", plan.committed)
        self.cursor.refeed = plan.committed
        # What is captured in a replay is of the state that training goes on from.
        self.log.epoch = plan.epoch
        if self._by_shard:
            # Training may go on before what some have been through.
            self.cursor.refeed = max(reached(p) for p in facts.positions.values())
            self._go_back(plan)
            return
        stage = plan.stage(self.topology.pp_rank)
        if stage is None:
            self._joined(plan, replayed=0)
            return
        self._logs_since = stage.base + 1
        if self.job.global_rank not in facts.lost:
            self._logs_since = min(self._position.since, self._logs_since)
        try:
            self._walk(plan, stage)
        except MissingFromInbox as error:
            self.job.send("hopeless", reason=str(error), state_lost=True)
            raise

    def _go_back(self, plan: Plan) -> None:
        """Brings this rank to the start of the iteration behind the one that counts as done."""
        at, bases = plan.committed, dict(plan.shards)
        base = bases.get(self.job.global_rank)
        if at > self._undone_to:
            # Copies may come in between two attempts. What is undone here is for good.
            raise RuntimeError(f"this rank went back to {self._undone_to}, before iteration {at}")
        was, self._undone_to = self._position, at
        gathers = {*bases, *plan.unfinished}
        if not gathers.isdisjoint(self.topology.stage(self.topology.pp_rank)):
            self._rebuild_shards(base, at)
        if base is not None:
            state = self.log.read_state(HeaderKey(at + 1) if self._newest > at else ResultKey(at))
            if state is not None:
                self.steering.load_state(state["steering"])
        self._next = at + 1
        if was.iteration > at:
            before = Progress.BEFORE_COMMIT
            self._move(replace(was, iteration=at + 1, progress=before, committed=at))
        told = {"from": was.iteration, "iteration": at, "base": base}
        self.job.events.emit("went-back", epoch=plan.epoch, **told)
        self._joined(plan, replayed=0)

    def _rebuild_shards(self, base: int | None, at: int) -> None:
        """Rebuilds what is to be rebuilt in this stage, and gathers its parameters."""
        mode, progress = self.cursor.mode, self.cursor.progress
        self.cursor.mode, self.cursor.progress = Mode.REPLAY, Progress.BEFORE_COMMIT
        try:
            self.host.begin_replay()
            if base is not None:
                began = time.perf_counter()
                num_updates = rebuild_shard(self.host, self.frames, self.log, base, at)
                ms = (time.perf_counter() - began) * 1000
                self.job.events.emit("rebuilt", iteration=at, base=base, updates=num_updates, ms=ms)
            self.host.sync_params()
            with self._lock:
                self._position = replace(self._position, gathered=True)
            self.host.end_replay()
        finally:
            self.cursor.mode, self.cursor.progress = mode, progress

    def _agree(self, plan: Plan) -> None:
        """Plans are pure; that all ranks made the same one is still checked, not assumed."""
        assert self.job.store is not None
        store = PrefixStore(f"moetion/plan/{plan.epoch}", self.job.store)
        agreed = store.compare_set("digest", "", plan.digest).decode()
        if agreed != plan.digest:
            raise RuntimeError(
                f"recovery plans differ between ranks: {agreed} and {plan.digest} ({plan})"
            )

    def _joined(self, plan: Plan, replayed: int) -> None:
        self.job.injector.reach("resume", plan.committed)
        if plan.stage(self.topology.pp_rank) is not None:
            # Whoever fails from here on has been somewhere, also on a node that has just begun.
            with self._lock:
                self._position = replace(self._position, since=self._logs_since)
                self.job.send("position", position=self._position.to_json())
        told = {"iteration": plan.committed, "digest": plan.digest, "replayed": replayed}
        rebuilt = plan.stage(self.topology.pp_rank) is not None
        rebuilt = rebuilt or self.job.global_rank in dict(plan.shards)
        self.job.send("joined", epoch=plan.epoch, rebuilt=rebuilt, **told)
        self.job.notices.wait("resume", plan.epoch)
        self._undone_to = sys.maxsize
        with self._lock:
            self._handled, self._frozen, self._verdict = plan.epoch, 0, None
        told = {"replayed": replayed, "iteration": plan.committed}
        self.job.events.emit("resumed", epoch=plan.epoch, **told)
        self._quiet, self._doubtful = plan.committed + UNTIL_QUIET, plan.committed + 1

    def _walk(self, plan: Plan, stage: StagePlan) -> None:
        dead = self.job.global_rank in plan.dead
        run_on = needs_result(self._position, plan.committed, dead)
        self._run_on = run_on
        timeline = self.steering.timeline
        capture = lambda i: self.capture(i, timeline.at(i).frame(i))  # noqa: E731
        self._rebuild = Rebuild(stage, self.host, self.frames, self.log, capture)
        before = replace(self.cursor)
        self._plan = plan
        self.boundaries.begin_replay(self._remade(plan))
        try:
            self.cursor.mode = Mode.REPLAY
            self._rebuild.load_base()
            self.job.events.emit("restored", epoch=plan.epoch, base=stage.base)
            for number, iteration in enumerate(stage.replay):
                self.job.injector.reach("replay", plan.committed, number)
                self._replay(iteration)
            if not run_on:
                self._end_replay()
        finally:
            self._rebuild = None
            if not run_on:
                self.cursor.__dict__.update(before.__dict__)
        if not run_on:
            self._joined(plan, len(stage.replay))

    def _remade(self, plan: Plan) -> Remade:
        assert self.job.store is not None
        store = PrefixStore(f"moetion/sent/{plan.epoch}", self.job.store)
        return Remade(plan, self.topology, self.job.vault, store, self.job.groups.waits)

    def _replay(self, iteration: int) -> None:
        assert self._rebuild is not None
        self.cursor.mode = Mode.REPLAY
        self.cursor.iteration, self.cursor.progress = iteration, Progress.BEFORE_COMMIT
        self.cursor.counts = Counter()
        self.job.progress.at(REPLAY, iteration)
        self._rebuild.start(iteration)
        try:
            result = self.host.run_step(iteration)
        except StopReplay:
            return
        self.job.events.emit("replayed", iteration=iteration)
        if self.cursor.mode is Mode.LIVE:
            self._result = (self._finish(iteration, result),)

    def _replayed(self, iteration: int) -> None:
        """After the optimizer step of a replayed iteration, inside the host's training step."""
        assert self._rebuild is not None
        self._rebuild.stepped(iteration)
        self.cursor.progress = Progress.AFTER_STEP
        assert self._plan is not None
        if iteration < self._plan.committed or not self._run_on:
            # What comes behind the step changes nothing that the next start does not put in place,
            # and may ask for results that nobody has any more.
            self.job.events.emit("replayed", iteration=iteration)
            raise StopReplay
        # From here the replayed iteration is the live one: the rest of the job is waiting in it.
        self._end_replay()
        replayed = len(self._rebuild.plan.replay)
        self.cursor.mode = Mode.LIVE
        self._joined(self._plan, replayed)
        was, committed = self._position, self._plan.committed
        after = Progress.AFTER_STEP
        self._move(replace(was, iteration=iteration, progress=after, committed=committed))

    def _end_replay(self) -> None:
        assert self._rebuild is not None
        assert self._plan is not None
        self._rebuild.done()
        self.job.events.emit("rebuilt", iteration=self._plan.committed)
