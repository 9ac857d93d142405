"""This rank's frames on their way into the vault, and which windows of them are to be spilled."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from megatron_moetion.inbox.key import FrameKey
from megatron_moetion.inbox.tap import Mode
from megatron_moetion.job import Notice
from megatron_moetion.schedule import FramePlan, Schedule
from megatron_moetion.snapshot.copier import Ticket, copier_for
from megatron_moetion.snapshot.frame import Piece, layout, operator_ends, poison, sources, to_meta
from megatron_moetion.vault.arena import size_class
from megatron_moetion.vault.budget import frame_bytes, staged_bytes
from megatron_moetion.vault.spill import Span
from megatron_moetion.worker import Worker


class Capturing:
    """Captures frames; at most one of them is not sealed yet.

    Args:
        worker: whose frames.
        reached: a fault may fire at this place.

    Attributes:
        stepped: the optimizer has made its update in the iteration that is captured next.
        complete_behind: frames up to this iteration are not all on this node.
    """

    def __init__(self, worker: Worker, reached: Callable[[str], None]) -> None:
        self._job, self._host, self._steering = worker.job, worker.host, worker.steering
        self._cursor, self._log, self._by_shard = worker.cursor, worker.log, worker.by_shard
        self._vault, self._reached = worker.job.vault, reached
        self._operators = {o.name: o for o in worker.host.operators}
        self._copier = copier_for(worker.host.device, self._seal_failed)
        self._frame: Ticket | None = None
        self._unsealed: tuple[str, Callable[[], None]] | None = None
        self._offered = 0
        self.stepped = False
        self.complete_behind = 0

    def begin(self, iteration: int) -> None:
        """An iteration begins, perhaps again: what it makes superfluous is given back."""
        self._drop_unsealed()
        timeline = self._steering.timeline
        self._vault.drop(timeline.oldest(iteration))
        if timeline.forget(iteration):
            self._vault.trim(self._frame_classes(timeline.newest))

    def capture(self, iteration: int) -> None:
        """Captures what the schedule has for an iteration, behind its optimizer step."""
        self._capture(iteration, self._steering.timeline.at(iteration).frame(iteration))

    def capture_dense(self, iteration: int) -> None:
        """Captures everything."""
        self._capture(iteration, self._steering.timeline.newest.dense)

    def _capture(self, iteration: int, plan: FramePlan) -> None:
        entries = list(sources(plan, self._operators, self._host.buffers()))
        pieces, nbytes = layout(entries)
        key = str(FrameKey(iteration))
        if self._frame is not None:
            # At most one frame is unsealed: replay may lag by one, and the logs are kept for that.
            self._frame.wait()
        data = self._vault.reserve(key, nbytes)
        half = len(entries) // 2
        self._copier.copy(entries[:half], pieces[:half], data)
        self._reached("capture")
        self._frame = self._copier.copy(entries[half:], pieces[half:], data)
        meta = {**to_meta(iteration, plan, pieces, self.stepped), "epoch": self._log.epoch}
        meta["cut"] = self._job.config.cut
        publish = self._publish(iteration, self._frame, pieces, data, meta)
        seal = partial(
            self._copier.seal, self._frame, key, publish, partial(self._vault.abandon, key)
        )
        if self._by_shard and self._cursor.mode is Mode.LIVE:
            # No replay finds out what the training step returns: its frame counts once that is
            # logged.
            self._unsealed = key, seal
            return
        seal()
        if self._cursor.mode is not Mode.LIVE:
            # The starting state, or a replay that is about to overwrite the sources.
            self._frame.wait()

    def _publish(
        self,
        iteration: int,
        frame: Ticket,
        pieces: Sequence[Piece],
        data: torch.Tensor,
        meta: Mapping[str, Any],
    ) -> Callable[[], None]:
        """Makes what seals a frame once its bytes are there; a scripted fault may spoil it."""
        live, injector = self._cursor.mode is Mode.LIVE, self._job.injector
        damage = live and injector.corrupts(iteration)
        poisoned = live and injector.poisons(iteration)
        ends = operator_ends(pieces, data.numel())

        def publish() -> None:
            if frame.nbytes:
                self._steering.pace.copied(frame.nbytes, frame.seconds())
            if poisoned:
                poison(pieces, data)
            self._vault.seal(str(FrameKey(iteration)), meta, ends)
            if damage:
                data[0] ^= 1

        return publish

    def wait_on_device(self) -> None:
        """Work issued from now on may overwrite what was captured last."""
        if self._frame is not None:
            self._frame.wait_on_device()

    def drain(self) -> None:
        """Returns once every frame whose seal was asked for is sealed, or cannot be."""
        self._copier.drain()

    def returned(self) -> None:
        """What the training step returns is logged: its frame counts."""
        if self._unsealed is not None:
            _, seal = self._unsealed
            self._unsealed = None
            seal()

    def _drop_unsealed(self) -> None:
        """The training step that this rank's newest frame is of does not return."""
        if self._unsealed is not None:
            assert self._frame is not None
            self._frame.wait_for_bytes()
            self._vault.abandon(self._unsealed[0])
            self._frame = self._unsealed = None

    def _seal_failed(self, key: str, error: Exception) -> None:
        self._job.events.emit("seal-failed", key=key, error=str(error))
        text = f"moetion: {key} of global rank {self._job.global_rank} is not sealed: {error}"
        print(text, file=sys.stderr, flush=True)

    def _frame_classes(self, schedule: Schedule) -> frozenset[int]:
        """Capacities of the chunks that frames lie in."""
        operators, buffer_bytes = self._operators, self._steering.buffer_bytes
        plans = map(schedule.frame_of_slot, range(schedule.window))
        return frozenset(size_class(frame_bytes(p, operators, buffer_bytes)) for p in plans)

    def device_bytes(self) -> int:
        """Device memory that is taken by one frame on its way, at most; one is at a time. On a CPU
        there is no way to go.
        """
        if self._host.device.type == "cpu":
            return 0
        now = self._steering.timeline.newest
        plans = map(now.frame_of_slot, range(now.window))
        operators, buffer_bytes = self._operators, self._steering.buffer_bytes
        return max(staged_bytes(plan, operators, buffer_bytes) for plan in plans)

    def offer_window(self, iteration: int) -> None:
        """Keeps the window that ends at `iteration` for the agent, if it is one to be spilled."""
        schedule, every = self._steering.timeline.at(iteration), self._job.config.spill_interval
        if self._job.link is None or not every or iteration <= self._offered:
            return
        if iteration - schedule.window < self.complete_behind:
            return
        if not schedule.closes_at(iteration) or schedule.number(iteration) % every:
            return
        self._offered = iteration
        span = Span(iteration - schedule.window + 1, iteration)
        kept = self._vault.keep(span.iterations)
        self._job.send("window", span=asdict(span), kept=kept)

    def on_notice(self, notice: Notice) -> None:
        """What the agent tells of frames; runs in the listener's thread."""
        match notice["op"]:
            case "release":
                self._vault.release(Span(**notice["span"]).iterations)
            case "replicated":
                self._steering.pace.replicated(notice["nbytes"], notice["seconds"])
