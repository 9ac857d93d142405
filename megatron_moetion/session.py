"""One worker's training session: the order of things in a training step.

The session decides nothing about state or plans. Where this rank stands towards the leader is
`standing`'s, its frames are `capturing`'s, the order behind the last gradient is `updating`'s, and
what happens when a peer is lost is `recovering`'s.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_moetion.capturing import Capturing
from megatron_moetion.claiming import claim_of, logs_of
from megatron_moetion.host import Host, State
from megatron_moetion.inbox.key import HeaderKey, ResultKey
from megatron_moetion.inbox.tap import BatchTap, BoundaryTap, CollectiveTap, Mode
from megatron_moetion.interlude import Interludes
from megatron_moetion.job import Job
from megatron_moetion.progress import BETWEEN, PLACES
from megatron_moetion.recovering import Recovering, Resumed
from megatron_moetion.recovery.failure import is_communication_error
from megatron_moetion.recovery.plan import Position, Progress, has_result
from megatron_moetion.standing import Standing
from megatron_moetion.steering import Steering
from megatron_moetion.topology import Topology
from megatron_moetion.updating import Updating
from megatron_moetion.worker import Worker


class Undone(Exception):
    """The iteration that this rank has made its update in does not count any more."""


class Session:
    """Protects the training steps of one worker.

    It is the gate that taps and interludes ask (`inbox.tap.Gate`, `interlude.Gate`): some of what
    they ask for has iterations run again.

    Between its calls it knows which iteration is next (`_next`), which is the newest that was begun
    (`_newest`), and in how many paused calls this rank is (`_paused`).
    """

    def __init__(self, job: Job, topology: Topology, host: Host, steering: Steering) -> None:
        worker = Worker.of(job, topology, host, steering)
        self.job, self.topology, self.host, self.steering = job, topology, host, steering
        self.cursor, self.log, self._by_shard = worker.cursor, worker.log, worker.by_shard
        self.collectives = CollectiveTap(self.cursor, self.log, topology, job.groups, self)
        self.boundaries = BoundaryTap(self.cursor, self.log, topology)
        self.batches = BatchTap(self.cursor, self.log)
        self.interludes = Interludes(self.cursor, self.log, host, job.groups.waits, self)
        self._standing = Standing(worker)
        self._capturing = Capturing(worker, self.reached)
        self._recovering = Recovering(
            worker, self._standing, self._capturing, self.collectives, self.boundaries
        )
        self.updating = Updating(
            worker,
            self._standing,
            self._capturing,
            self._recovering,
            self.collectives,
            self.reached,
        )
        self._next = self._newest = self._paused = 0
        self._began: tuple[int, float] | None = None
        self._buffers: tuple[int, dict[str, torch.Tensor]] = (0, {})
        steering.ceiling = job.ceiling
        job.hooks.extend((self._standing.on_notice, self._capturing.on_notice))

    @property
    def position(self) -> Position:
        return self._standing.position

    @property
    def in_doubt(self) -> bool:
        """Whether what this rank computes comes right out of state that was rebuilt from memory,
        its own or its peers'.
        """
        replays = self.cursor.mode is Mode.REPLAY
        return replays or self._recovering.in_doubt(self.cursor.iteration)

    def reached(self, place: str, microbatch: int | None = None) -> None:
        """A place that the agent is to see. A scripted fault may fire here; never in replay."""
        if self.cursor.mode is not Mode.LIVE and not self.interludes.inside:
            self.job.progress.moved()
        else:
            # The gather of step i may run inside iteration i + 1, overlapped with its forward
            # passes.
            gather = place == "param-gather"
            iteration = self.position.committed if gather else self.position.iteration
            self.job.progress.at(place, iteration, microbatch)
            self.job.injector.reach(place, iteration, microbatch)

    def begin(self, iteration: int) -> None:
        """Start of an iteration, first time or again after an abort."""
        self.cursor.counts, self.cursor.closing = Counter(), False
        self.cursor.mode, self.cursor.since = Mode.LIVE, self.log.epoch
        if not self._paused:
            self.job.groups.forget_stale()
        self._recovering.begin(iteration)
        # Before anything new is logged: what is claimed at the start counts on that.
        self._capturing.begin(iteration)
        key = HeaderKey(iteration)
        known = self.log.read_state(key) if iteration <= self._newest else None
        self._newest = max(self._newest, iteration)
        if known is None:
            self.log_start(iteration, self.host.start_state())
        else:
            self.host.take_over(known)
        self._restore_buffers(iteration)
        # The frame before the last one is sealed for sure.
        self._capturing.offer_window(iteration - 2)
        self._time(iteration)
        if self.steering.counts_loads:
            self.host.count_loads()
        was, before = self.position, Progress.BEFORE_COMMIT
        ended = max(was.ended, (iteration, 0))
        self._standing.move(replace(was, iteration=iteration, progress=before, ended=ended))
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

    def log_again(self, iteration: int, state: State, epoch: int) -> None:
        """`log_start` of a replacement on a node that has nothing of its predecessor.

        Args:
            epoch: of the facts by which it begins there: with an earlier one what it logs would
                count as given up if another failure comes before training goes on.
        """
        self.log.epoch = epoch
        self.log_start(iteration, state)

    def _time(self, iteration: int) -> None:
        if self.job.progress.begin(iteration):
            self.job.events.emit("steady", iteration=iteration)
            self.job.send("steady")
        now, began = time.perf_counter(), self._began
        if began is not None and began[0] == iteration - 1:
            self.steering.pace.iterated(now - began[1])
        self._began = (iteration, now)

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
                replayed = self._give_up(error)
                if replayed is not None:
                    self._next = last + 1
                    return replayed[0]
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
        self._capturing.returned()
        self._standing.move(replace(self.position, progress=Progress.RETURNED))
        self.reached("end")
        return result

    def logged(self, iteration: int) -> None:
        """The log line of an iteration has been written."""
        self._standing.logged(iteration)

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
        """See `Capturing.device_bytes`."""
        return self._capturing.device_bytes()

    def protect(self, iteration: int) -> None:
        """Takes the dense frame of the starting state: protection begins before the first step."""
        self._capturing.capture_dense(iteration)
        self.log_start(iteration + 1, self.host.start_state())
        # Nobody says that it is protected before everybody is. The barrier is small talk already: a
        # rank that fails right behind it leaves its peers paused here, not lost.
        self._standing.take_up(Position(iteration, Progress.RETURNED, iteration, iteration))
        self.cursor.mode, self.cursor.iteration = Mode.LIVE, iteration
        dist.barrier()
        self._next = self._newest = iteration + 1
        before = Progress.BEFORE_COMMIT
        self._standing.move(Position(iteration + 1, before, iteration, iteration))

    def await_commit(self, error: Exception) -> None:
        """See `inbox.tap.Gate`."""
        self._standing.await_commit(error)

    def update(self, run: Callable[[], Any]) -> Any:
        """See `inbox.tap.Gate`."""
        return self._standing.update(run)

    def pause(self, error: Exception) -> None:
        """See `inbox.tap.Gate`: a rank past its step waits inside its collective."""
        self._standing.settle()
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
        if self._by_shard or self._standing.gives_up:
            self.host.load_live_state(saved)
        self.cursor.refeed = max(self.cursor.refeed, self.cursor.iteration)

    def _give_up(self, error: Exception) -> tuple[Any] | None:
        """The iteration is unwound: recover.

        Returns:
            A one-tuple with what the iteration returned in a replay; None when it is run again.
        """
        if not is_communication_error(error):
            raise error
        if self._by_shard and self.position.committed == self.position.iteration:
            # The others count on this rank to have made the update.
            raise error
        self._standing.failure(error)
        # The traceback holds the activations of the iteration that is given up.
        traceback.clear_frames(error.__traceback__)
        self.host.reset_after_abort()
        return self._recover(error)

    def _recover(self, error: Exception) -> tuple[Any] | None:
        # How long this iteration takes says nothing.
        self._began = None
        return self._take(self._recovering.recover(error, self._newest))

    def _take(self, resumed: Resumed) -> tuple[Any] | None:
        if resumed.next is not None:
            self._next = resumed.next
        if resumed.result is None:
            return None
        return (self._finish(self.cursor.iteration, resumed.result[0]),)

    def join(self, iteration: int) -> Any:
        """A replacement enters training: its first training step is the one the dead worker was in.

        Returns:
            A one-tuple with the step's result, or None when the iteration is to be run as usual.
        """
        last = self._recovering.take_up(iteration)
        self.cursor.iteration = self._newest = self._next = last.iteration
        # The data iterator of a replacement begins with this one.
        self.batches.newest = last.iteration + (last.progress is Progress.RETURNED)
        result = self._take(self._recovering.join(last, iteration))
        if result is not None:
            self._next = iteration + 1
            return result
        facts = self.job.facts
        assert facts is not None
        if not has_result(last, facts.committed, self._by_shard):
            return None
        if self._by_shard and self._next <= iteration:
            self._run_up_to(iteration, lambda: self.host.run_step(iteration))
        self._next = iteration + 1
        state = self.log.read_state(ResultKey(iteration))
        self.host.load_start_state(state["state"])
        self.cursor.mode = Mode.LIVE
        self.cursor.refeed = max(self.cursor.refeed, iteration)
        self.cursor.counts = Counter(state["counts"])
        self._standing.move(self.position)
        return (tuple(state["result"]),)

    def positions(self) -> Iterable[Position]:
        """See `interlude.Gate`."""
        return self.job.facts.positions.values() if self.job.facts is not None else ()

    def ended(self, iteration: int, count: int) -> None:
        """See `interlude.Gate`."""
        self._standing.ended(iteration, count)

    def told(self, iteration: int, count: int) -> None:
        """See `interlude.Gate`."""
        self._standing.told(iteration, count)

    def aside(self, name: str) -> AbstractContextManager[None]:
        """See `interlude.Gate`."""
        return self.job.progress.aside(name if name in PLACES else BETWEEN)

    def hopeless(self, reason: str) -> None:
        """See `interlude.Gate`."""
        self.job.hopeless(reason)
