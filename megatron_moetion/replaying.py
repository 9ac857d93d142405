"""This rank's walk through the plan of its stage: from the base to the iteration that counts.

The replayed iterations run in the host's own training step. The session meets them again behind the
optimizer's step, and asks here how to go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_moetion.inbox.tap import Mode
from megatron_moetion.progress import REPLAY
from megatron_moetion.recovery.plan import Plan, Progress, StagePlan, needs_result
from megatron_moetion.recovery.rebuild import Rebuild
from megatron_moetion.standing import Standing
from megatron_moetion.worker import Worker


class StopReplay(Exception):
    """Ends a replayed training step after its optimizer step: this rank, or its predecessor, has
    been through the rest of it.
    """


class Replay:
    """One attempt at a stage plan.

    Args:
        worker: whose stage is rebuilt.
        standing: of this rank.
        plan: that `stage` is of.
        rebuild: puts state in place.
        joined: called once, when the state is rebuilt; returns when everybody can go on.
    """

    def __init__(
        self,
        worker: Worker,
        standing: Standing,
        plan: Plan,
        stage: StagePlan,
        rebuild: Rebuild,
        joined: Callable[[], None],
    ) -> None:
        self._job, self._host, self._cursor = worker.job, worker.host, worker.cursor
        self._standing, self._plan, self._stage = standing, plan, stage
        self._rebuild, self._joined = rebuild, joined
        dead = self._job.global_rank in plan.dead
        self._runs_on = needs_result(standing.position, plan.committed, dead)
        """The last replayed iteration becomes the live one: its result is still needed."""

    def run(self) -> tuple[Any] | None:
        """Returns when everybody goes on.

        Returns:
            A one-tuple with what the training step of the iteration that counts has returned, if it
            was run to its end; it has yet to be logged.
        """
        before = replace(self._cursor)
        result = None
        try:
            self._cursor.mode = Mode.REPLAY
            self._rebuild.load_base()
            self._job.events.emit("restored", epoch=self._plan.epoch, base=self._stage.base)
            for number, iteration in enumerate(self._stage.replay):
                self._job.injector.reach("replay", self._plan.committed, number)
                result = self._run_again(iteration)
            if not self._runs_on:
                self._end()
        finally:
            if not self._runs_on:
                self._cursor.__dict__.update(before.__dict__)
        if not self._runs_on:
            self._joined()
        return result

    def _run_again(self, iteration: int) -> tuple[Any] | None:
        cursor = self._cursor
        cursor.mode, cursor.counts = Mode.REPLAY, Counter()
        cursor.iteration, cursor.progress = iteration, Progress.BEFORE_COMMIT
        self._job.progress.at(REPLAY, iteration)
        self._rebuild.start(iteration)
        try:
            result = self._host.run_step(iteration)
        except StopReplay:
            return None
        self._job.events.emit("replayed", iteration=iteration)
        return (result,) if cursor.mode is Mode.LIVE else None

    def stepped(self, iteration: int) -> None:
        """After the optimizer step of a replayed iteration, inside the host's training step.

        Raises:
            StopReplay: nothing of what comes behind the step is needed.
        """
        self._rebuild.stepped(iteration)
        self._cursor.progress = Progress.AFTER_STEP
        if iteration < self._plan.committed or not self._runs_on:
            # What comes behind the step changes nothing that the next start does not put in place,
            # and may ask for results that nobody has any more.
            self._job.events.emit("replayed", iteration=iteration)
            raise StopReplay
        # From here the replayed iteration is the live one: the rest of the job is waiting in it.
        self._end()
        self._cursor.mode = Mode.LIVE
        self._joined()
        was, committed = self._standing.position, self._plan.committed
        after = Progress.AFTER_STEP
        self._standing.move(replace(was, iteration=iteration, progress=after, committed=committed))

    def _end(self) -> None:
        self._rebuild.done()
        self._job.events.emit("rebuilt", iteration=self._plan.committed)
