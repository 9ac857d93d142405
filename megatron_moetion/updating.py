"""The update of one iteration: from its last gradient over the commit point to its frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_moetion.capturing import Capturing
from megatron_moetion.inbox.tap import CollectiveTap, Mode
from megatron_moetion.recovering import Recovering
from megatron_moetion.recovery.plan import Progress
from megatron_moetion.standing import Standing
from megatron_moetion.worker import Worker


class Updating:
    """What stands around the optimizer, in training and in replay.

    Args:
        worker: whose updates.
        standing: of this rank; it passes the commit point.
        capturing: takes the frame behind the update.
        recovering: says how a replay goes on behind the update.
        collectives: proves that all ranks have come to the commit point.
        reached: a fault may fire at this place.
    """

    def __init__(
        self,
        worker: Worker,
        standing: Standing,
        capturing: Capturing,
        recovering: Recovering,
        collectives: CollectiveTap,
        reached: Callable[[str], None],
    ) -> None:
        self._job, self._host, self._steering = worker.job, worker.host, worker.steering
        self._cursor, self._by_shard = worker.cursor, worker.by_shard
        self._standing, self._capturing, self._recovering = standing, capturing, recovering
        self._collectives, self._reached = collectives, reached

    def step(self, run: Callable[[], Any]) -> Any:
        """Stands around the outermost optimizer's step."""
        if self._cursor.mode is Mode.OFF:
            return run()
        self._collectives.world_passed = self._capturing.stepped = False
        # The step overwrites what may still be on its way to the host.
        self._capturing.wait_on_device()
        iteration = self._cursor.iteration
        self._cursor.closing = self._by_shard
        try:
            result = run()
            if self._cursor.mode is Mode.LIVE and self._standing.position.committed < iteration:
                # There was nothing to update, or too large a gradient.
                self.commit(updates=False)
        finally:
            self._cursor.closing = False
        if self._cursor.mode is Mode.REPLAY:
            self._recovering.replayed(iteration)
            return result
        if self._by_shard and iteration <= self._cursor.refeed:
            # Whoever waits behind this iteration may have had its parameters gathered.
            self._standing.update(self._host.sync_params)
        self._capturing.capture(iteration)
        self._standing.move(replace(self._standing.position, progress=Progress.AFTER_STEP))
        return result

    def commit(self, updates: bool = True) -> None:
        """Right before the first parameter changes: every rank holds its final gradients (design
        section 6).

        Args:
            updates: the optimizers make their update now; else it is left out in this iteration.
        """
        iteration = self._cursor.iteration
        self._capturing.stepped = updates
        if self._cursor.mode is Mode.REPLAY:
            self._host.drop_frozen_gradients()
            if iteration == self._standing.position.iteration:
                # What was decided before that, this rank knows.
                self._steer()
            return
        if self._cursor.mode is Mode.OFF or self._standing.position.committed == iteration:
            return
        self._steering.loaded(iteration, self._host.take_load())
        self._steer()
        self._collectives.pass_world(self._host.device)
        self._reached("commit")
        self._standing.commit()

    def _steer(self) -> None:
        """At the end of a window, agrees on how to capture the next ones. Whatever is told inside a
        stage comes before the collective of the world that all commit behind.
        """
        iteration, timeline = self._cursor.iteration, self._steering.timeline
        if not timeline.at(iteration).closes_at(iteration):
            return
        self._collectives.world_passed = False
        news = self._steering.decide(iteration, self._collectives)
        if news is not None and self._job.global_rank == 0 and self._cursor.mode is Mode.LIVE:
            print(f"moetion: from iteration {iteration + 1} on {news}", flush=True)
        if timeline.newest.first > iteration:
            self.tell_schedule()

    def tell_schedule(self) -> None:
        """For the timeline of events."""
        now = self._steering.timeline.newest
        slots = [[part.to_json() for part in parts] for parts in now.slots]
        fields = {"window": now.window, "policy": now.policy, "split": now.split, "slots": slots}
        self._job.events.emit("scheduled", first=now.first, **fields)
