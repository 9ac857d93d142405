"""Where this rank stands towards the leader: how far it is, and what a failure asks of it.

Two threads meet here, and nowhere else: training, which moves, and the listener of the agent's
notices. A failure goes by here like this:

freeze    no commit point is passed any more; a survivor reports where it is
verdict   the iteration that counts as done everywhere; who has yet to finish it does, and settles
abort     everybody leaves all groups
resume    the job goes on in a new epoch: the freeze is over
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_moetion.inbox.tap import Mode
from megatron_moetion.job import Notice
from megatron_moetion.recovery.failure import Interrupted, Superseded, is_communication_error
from megatron_moetion.recovery.plan import Facts, Position, Progress
from megatron_moetion.worker import Worker


@dataclass
class _Freeze:
    """One failure, from the first notice of it until the job goes on.

    Attributes:
        epoch: that it begins.
        verdict: the iteration that counts as done everywhere; None until the leader knows.
        settled: this rank has told that it stands where it is to stand.
    """

    epoch: int
    verdict: int | None = None
    settled: bool = False


class Standing:
    """This rank's position, and the freeze that it may be under.

    The lock guards both. What others count on once it is done (a commit point, the end of an
    interlude) is done under it, before a freeze or not at all: a position that was reported under a
    freeze is still true when the leader comes to its verdict.
    """

    def __init__(self, worker: Worker) -> None:
        self._job, self._topology = worker.job, worker.topology
        self._cursor, self._by_shard = worker.cursor, worker.by_shard
        self._lock = threading.RLock()
        self._position = Position()
        self._freeze: _Freeze | None = None
        self._epoch = 0
        self._dead: tuple[int, ...] = ()

    @property
    def position(self) -> Position:
        return self._position

    @property
    def epoch(self) -> int:
        """Of the newest failure that this rank has recovered from; 0 before the first."""
        return self._epoch

    @property
    def gives_up(self) -> bool:
        """Whether the newest failure makes this rank leave the iteration that it is in, wherever it
        is: its stage is rebuilt.
        """
        failed = self._topology.stages_of(self._dead)
        return not self._by_shard and self._topology.pp_rank in failed

    def take_up(self, position: Position) -> None:
        """Stands where a predecessor was or protection begins; nobody is told."""
        with self._lock:
            self._position = position

    def learn(self, facts: Facts) -> None:
        """A replacement learns of the failure that it is there for, without any freeze."""
        with self._lock:
            self._dead = facts.dead

    def move(self, position: Position) -> None:
        """Stands elsewhere, for the taps too; the leader is told."""
        with self._lock:
            self._position = position
            self._cursor.iteration, self._cursor.progress = position.iteration, position.progress
            self._tell()
            if position.progress.order >= Progress.AFTER_STEP.order:
                self.settle()

    def _tell(self) -> None:
        self._job.send("position", position=self._position.to_json())

    def gathered(self, done: bool) -> None:
        """Whether this rank has all parameters of its stage; told with the next move or report."""
        with self._lock:
            self._position = replace(self._position, gathered=done)

    def logs_since(self, iteration: int) -> None:
        """The oldest iteration of which what it sent is in the log of its node."""
        with self._lock:
            self._position = replace(self._position, since=iteration)
            self._tell()

    def logged(self, iteration: int) -> None:
        """The log line of an iteration has been written."""
        self.move(replace(self._position, logged=iteration))

    def told(self, iteration: int, count: int) -> None:
        """See `interlude.Gate`."""
        self.move(replace(self._position, told=(iteration, count)))

    def ended(self, iteration: int, count: int) -> None:
        """See `interlude.Gate`: before a freeze or not at all, like the commit point."""
        with self._lock:
            if self._freeze is not None:
                raise Interrupted("a peer was lost before this rank was through")
            self.move(replace(self._position, ended=(iteration, count)))

    def commit(self) -> None:
        """Passes the commit point of this iteration: before a freeze, or behind a verdict by which
        somebody else did.

        Raises:
            Interrupted: nobody did; the iteration is given up.
        """
        with self._lock:
            frozen = self._freeze is not None
            if not frozen:
                self._pass()
        if frozen:
            self.await_commit(Interrupted("a peer was lost at the commit point"))
            with self._lock:
                self._pass()

    def _pass(self) -> None:
        i, self._cursor.closing = self._cursor.iteration, False
        self.move(replace(self._position, progress=Progress.STEPPING, committed=i))

    def await_commit(self, error: Exception) -> None:
        """See `inbox.tap.Gate`: a rank at the commit point learns whether others passed it."""
        committed = self._verdict_of(self.failure(error))
        if committed < self._cursor.iteration or self.gives_up:
            raise Interrupted(f"iteration {self._cursor.iteration} is given up") from error

    def _verdict_of(self, epoch: int) -> int:
        """The committed iteration by the verdict of this epoch, or of a later one."""
        while True:
            try:
                return int(self._job.notices.wait("verdict", epoch)["committed"])
            except Superseded as again:
                epoch = self._job.notices.failure(again, epoch)

    def update(self, run: Callable[[], Any]) -> Any:
        """See `inbox.tap.Gate`. Under the stage cut a rank that fails in its update is rebuilt with
        its stage. Under the shard cut its optimizer's own part needs nobody, and what it gathers is
        gathered in the recovery.
        """
        stepping = self._cursor.progress is Progress.STEPPING and self._cursor.mode is Mode.LIVE
        if not (self._by_shard and stepping):
            return run()
        try:
            return run()
        except Exception as error:
            if not is_communication_error(error):
                raise
            self.gathered(False)
            self.failure(error)
            # Nothing may be written to the parameters any more.
            self._job.groups.waits.settle()
            return None

    def failure(self, error: Exception) -> int:
        """Waits for the notice of the failure that explains a communication error; its epoch.

        Raises:
            Exception: the error itself, when there is none in time.
        """
        return self._job.notices.failure(error, self._epoch)

    def settle(self) -> None:
        """Tells once that this rank stands where it is to stand, and not before anybody asks."""
        with self._lock:
            freeze = self._freeze
            if freeze is not None and freeze.verdict is not None and not freeze.settled:
                freeze.settled = True
                self._job.send("settled", epoch=freeze.epoch)

    def resumed(self, epoch: int) -> None:
        """The job goes on in this epoch, unless a later failure has frozen it already: that is
        known to the listener before training comes here.
        """
        with self._lock:
            self._epoch = epoch
            if self._freeze is not None and self._freeze.epoch <= epoch:
                self._freeze = None

    def on_notice(self, notice: Notice) -> None:
        """What the agent tells of a failure; runs in the listener's thread."""
        match notice["op"]:
            case "freeze":
                self._on_freeze(notice["epoch"], tuple(notice["dead"]))
            case "verdict":
                self._on_verdict(notice["epoch"], notice["committed"])
            case "abort":
                self._abort(notice["epoch"])

    def _on_freeze(self, epoch: int, dead: tuple[int, ...]) -> None:
        self._job.groups.cancel(epoch)
        with self._lock:
            self._freeze, self._dead = _Freeze(epoch), dead
            position = self._position
        if self._job.global_rank in dead:
            self._abort(epoch)
        else:
            self._job.send("report", epoch=epoch, position=position.to_json())

    def _on_verdict(self, epoch: int, committed: int) -> None:
        failed = self.gives_up
        with self._lock:
            if self._freeze is not None:
                self._freeze.verdict = committed
            p = self._position
            finishing = p.iteration == committed and p.progress.order < Progress.AFTER_STEP.order
            if failed or not finishing:
                self.settle()
        # A healthy rank past the commit point goes on inside its stage, under the shard cut on its
        # own; whatever crosses that is cut.
        alone = failed or self._by_shard
        self._abort(epoch, None if alone else self._topology.spans_stages)

    def _abort(self, epoch: int, crosses: Callable[[tuple[int, ...]], bool] | None = None) -> None:
        self._job.groups.abort(epoch, self._job.store_port, crosses)
