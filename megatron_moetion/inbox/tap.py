"""Where a stage's inputs pass: logged in training, fed back in replay.

Three taps share one cursor: collectives, pipeline boundaries, data batches. What they decide
depends only on the cursor (iteration, progress, mode, cut) and on whether the group crosses stages.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_moetion.inbox.key import BatchKey, BoundaryKey, CollectiveKey, Direction
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.recovery.failure import MissingFromInbox, is_communication_error
from megatron_moetion.recovery.plan import Progress
from megatron_moetion.recovery.regroup import GroupRecorder
from megatron_moetion.recovery.waiting import Wait
from megatron_moetion.topology import Topology


class Mode(Enum):
    """OFF: pass through (set-up, evaluation, saving). LIVE: log. REPLAY: feed from the log."""

    OFF = 0
    LIVE = 1
    REPLAY = 2


@dataclass
class Cursor:
    """Where this rank is, as the taps see it.

    Attributes:
        mode: what the taps do.
        iteration: the iteration that entries are logged under.
        progress: how far inside it; from AFTER_STEP on every collective is small talk: logged and
            repeatable.
        refeed: the newest iteration of whose small talk peers may have had some before a failure:
            results that a peer already has are taken from its log instead of asking peers that have
            moved on.
        counts: entries so far in this iteration, by kind and place.
        replays: iterations are replayed from what entered the stage (the stage cut). Else (the
            shard cut) nothing is logged before the optimizer's step, and an iteration that is cut
            short there is run again as a whole.
        closing: under the shard cut, in the optimizer's step before its commit point: what ranks
            agree on here is logged, for those that a failure keeps from hearing of it.
        since: the epoch in which this run of the iteration began.
    """

    mode: Mode = Mode.OFF
    iteration: int = 0
    progress: Progress = Progress.RETURNED
    refeed: int = -1
    counts: Counter[str] = field(default_factory=Counter)
    replays: bool = True
    closing: bool = False
    since: int = 0

    def take(self, place: str) -> int:
        """The next ordinal at a place."""
        ordinal = self.counts[place]
        self.counts[place] += 1
        return ordinal

    @property
    def small_talk(self) -> bool:
        return self.progress.order >= Progress.AFTER_STEP.order

    @property
    def believes(self) -> int:
        """The oldest epoch whose results are those of this run of the iteration.

        A replay gives the same results as the run before it. What is run again under the shard cut
        need not, until its end: from there on everybody is to be told what others were.
        """
        return 0 if self.replays or self.progress is Progress.RETURNED else self.since


class Gate(Protocol):
    """What a tap asks of the session when a peer is lost."""

    def await_commit(self, error: Exception) -> None:
        """Returns when others passed this iteration's commit point, else raises Interrupted."""

    def pause(self, error: Exception) -> None:
        """Recovers in place; returns when the job goes on."""

    def update(self, run: Callable[[], Any]) -> Any:
        """Runs something. If it belongs to the update behind the commit point and a peer is lost,
        gives it up and returns None: it is made up for after the recovery.
        """

    def reached(self, place: str) -> None:
        """A fault may fire here."""


class Edges(Protocol):
    """What a rebuild knows of what crosses stage edges."""

    def logged(self, key: BoundaryKey) -> bool:
        """Whether it is in this rank's log, from before the rebuild."""

    def tell(self, key: BoundaryKey) -> None:
        """It is in this rank's log by now: others may wait for it."""

    def wait(self, sender: int, key: BoundaryKey) -> bool:
        """Returns once it is in the log of a rank that is rebuilt, too; False if that rank is not.

        Raises:
            Interrupted, dist.DistError: a peer was lost.
        """


# The arguments of each collective that hold its results.
_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "all_reduce": ("tensor",),
    "broadcast": ("tensor",),
    "reduce": ("tensor",),
    "barrier": (),
    "all_gather": ("tensor_list",),
    "all_gather_into_tensor": ("output_tensor",),
    "_all_gather_base": ("output_tensor",),
    "reduce_scatter_tensor": ("output",),
}


class CollectiveTap:
    """Logs and feeds collectives that cross stages, and all small talk after the optimizer step."""

    def __init__(
        self, cursor: Cursor, log: InboxLog, topology: Topology, groups: GroupRecorder, gate: Gate
    ) -> None:
        self._cursor, self._log, self._topology = cursor, log, topology
        self._groups, self._gate = groups, gate
        self._members: dict[str, tuple[int, ...]] = {}
        self._signatures: dict[str, inspect.Signature] = {}
        self._apart = False
        self.world_passed = False

    def pass_world(self, device: torch.device) -> None:
        """Passes a world-wide barrier, unless a collective of the whole world was met since
        `world_passed` fell.

        With the distributed optimizer the gradient norm is one (design section 6).
        """
        if not self.world_passed:
            self.all_reduce(torch.zeros(1, device=device))
            self.world_passed = True

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None
    ) -> None:
        """An all-reduce of ours, in place: logged inside a stage, too, and not counted with the
        host's own, which replay may meet without it.
        """
        with self._ours():
            dist.all_reduce(tensor, op=op, group=group)

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """All ranks' rows, shape [world_size, len(row)]; logged as `all_reduce` is."""
        # Nothing is added but zeros, so every number arrives as it was.
        rows = row.new_zeros(self._topology.world_size, len(row))
        rows[self._topology.global_rank] = row
        self.all_reduce(rows)
        return rows

    @contextmanager
    def _ours(self) -> Iterator[None]:
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def forget(self) -> None:
        """Group objects have changed; members are the same, so nothing else is kept of them."""
        self._members.clear()

    def members(self, name: str, group: Any) -> tuple[int, ...]:
        """Global ranks of a group; empty when this rank is not a member."""
        if name not in self._members:
            outside = group is not None and not isinstance(group, dist.ProcessGroup)
            ranks = () if outside else tuple(dist.get_process_group_ranks(group))
            self._members[name] = ranks
        return self._members[name]

    def call(self, name: str, host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands around one torch.distributed function."""
        if self._cursor.mode is Mode.OFF:
            return host(*args, **kwargs)
        bound = self._bind(name, host, args, kwargs)
        group = bound.arguments.get("group")
        label = self._groups.name(group)
        members = self.members(label, self._groups.current(group))
        crosses = self._topology.spans_stages(members) if members else False
        everybody = len(members) == self._topology.world_size
        if not (self._cursor.replays or self._cursor.closing or self._cursor.small_talk):
            if (crosses or everybody) and not self._apart:
                self._gate.reached("norm")
            result = self._gate.update(lambda: self._run(host, bound, crosses))
            self._seen(members)
            return result
        asynchronous = bool(bound.arguments.get("async_op"))
        talk = self._cursor.small_talk and self._cursor.mode is Mode.LIVE
        ours = self._apart
        if len(members) > 1:
            ours = ours or crosses or talk or (everybody and self._cursor.closing)
        elif members:
            # Nobody is lost in a group of one, but its waits are called off as all others are.
            ours = ours or (talk and not asynchronous)
        if self._cursor.closing and (not ours or asynchronous or name not in _OUTPUTS):
            # Whoever passed the world before it need not be past it, and nobody logs it.
            self.world_passed = False
            return self._run(host, bound, crosses)
        if not ours or name not in _OUTPUTS:
            if ours and crosses and not self._cursor.small_talk:
                raise MissingFromInbox(
                    f"{name} on group {label} {members} crosses stages and cannot be logged"
                )
            return self._run(host, bound, crosses)
        if asynchronous:
            raise MissingFromInbox(
                f"asynchronous {name} on group {label} {members} cannot be logged"
            )
        place = f"{label}+" if self._apart else label
        key = CollectiveKey(self._cursor.iteration, place, self._cursor.take(f"collective/{place}"))
        outputs = _tensors(name, bound)
        refed = self._cursor.iteration <= self._cursor.refeed
        # What is run again as a whole has other results before its end.
        refed = refed and (self._cursor.replays or self._cursor.small_talk)
        if self._cursor.mode is Mode.REPLAY or refed:
            if self._feed(key, outputs, members):
                self._seen(members)
                return None
            if self._cursor.mode is Mode.REPLAY and crosses:
                raise MissingFromInbox(
                    f"replay of iteration {key.iteration} met {name} number {key.ordinal} on "
                    f"group {label} {list(members)}, which nobody logged"
                )
        if not (self._cursor.small_talk or self._apart):
            self._gate.reached("norm")
        result = self._live(key, host, bound, outputs, members)
        self._seen(members)
        return result

    def _seen(self, members: tuple[int, ...]) -> None:
        self.world_passed = self.world_passed or len(members) == self._topology.world_size

    def _live(self, key: CollectiveKey, host: Callable[..., Any], bound: inspect.BoundArguments,
              outputs: Sequence[torch.Tensor], members: tuple[int, ...]) -> Any:  # fmt: skip
        repeatable = self._cursor.progress is not Progress.BEFORE_COMMIT
        before = [t.clone() for t in outputs] if repeatable else []
        while True:
            try:
                result = self._run(host, bound, self._topology.spans_stages(members))
                self._log.write(key, outputs, self._groups.waits.only_intact)
            except Exception as error:
                if not is_communication_error(error):
                    raise
                # Nothing may be written to the outputs any more but what is fed below.
                self._groups.waits.settle()
                (self._gate.pause if repeatable else self._gate.await_commit)(error)
            else:
                return result
            if self._feed(key, outputs, members):
                return None
            if not repeatable:
                raise MissingFromInbox(
                    f"iteration {key.iteration} is committed, but nobody holds {key}"
                )
            for tensor, value in zip(outputs, before, strict=True):
                tensor.copy_(value)

    def _run(self, host: Callable[..., Any], bound: inspect.BoundArguments, crosses: bool) -> Any:
        if "group" in bound.arguments:
            bound.arguments["group"] = self._groups.current(bound.arguments["group"])
        with self._groups.waits.of(Wait.CROSSING if crosses else Wait.INSIDE):
            return host(*bound.args, **bound.kwargs)

    def _feed(
        self, key: CollectiveKey, outputs: Sequence[torch.Tensor], members: tuple[int, ...]
    ) -> bool:
        since = self._cursor.believes
        logged = self._log.read(key, [self._topology.global_rank], since)
        if logged is None:
            others = [rank for rank in members if rank != self._topology.global_rank]
            logged = self._log.read(key, others, since)
            if logged is None:
                return False
            # Whoever has it may be the next to be lost.
            self._log.write(key, logged)
        with torch.no_grad():
            for tensor, value in zip(outputs, logged, strict=True):
                tensor.copy_(value)
        return True

    def _bind(
        self, name: str, host: Callable[..., Any], args: Any, kwargs: Any
    ) -> inspect.BoundArguments:
        if name not in self._signatures:
            self._signatures[name] = inspect.signature(host)
        return self._signatures[name].bind(*args, **kwargs)


def _tensors(name: str, bound: inspect.BoundArguments) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for argument in _OUTPUTS[name]:
        value = bound.arguments[argument]
        found.extend(value if isinstance(value, (list, tuple)) else [value])
    return found


class BoundaryTap:
    """Logs what this rank sends over a stage edge; in replay, receives come from the neighbours'
    logs.

    In replay nothing is sent: the neighbours that wait have it already. What is not in the log any
    more, as it was lost with a node, is logged again, and a neighbour that is rebuilt at the same
    time waits for that.
    """

    def __init__(self, cursor: Cursor, log: InboxLog, topology: Topology) -> None:
        self._cursor, self._log, self._topology = cursor, log, topology
        self._edges: Edges | None = None

    def begin_replay(self, edges: Edges) -> None:
        """From now on replays are part of this rebuild."""
        self._edges = edges

    def sent(self, direction: Direction, tensor: torch.Tensor | None) -> None:
        """Logs one tensor that is being sent. The caller may free it once this returns."""
        if tensor is None or self._cursor.mode is Mode.OFF or not self._cursor.replays:
            return
        ordinal = self._cursor.take(f"sent/{direction}")
        key = BoundaryKey(self._cursor.iteration, direction, ordinal)
        if self._cursor.mode is Mode.LIVE:
            self._log.write(key, [tensor])
            return
        assert self._edges is not None
        if not self._edges.logged(key):
            self._log.write(key, [tensor])
        self._edges.tell(key)

    def receive(self, direction: Direction) -> torch.Tensor:
        """The next tensor that enters this stage in replay, on the training device, a fresh copy.

        Raises:
            MissingFromInbox: when its sender did not log it.
        """
        ordinal = self._cursor.take(f"received/{direction}")
        key = BoundaryKey(self._cursor.iteration, direction, ordinal)
        neighbours = (
            self._topology.prev_ranks
            if direction is Direction.FORWARD
            else self._topology.next_ranks
        )
        sender = neighbours[self._topology.global_rank]
        logged = self._log.read(key, [sender])
        if logged is None and self._edges is not None and self._edges.wait(sender, key):
            logged = self._log.read(key, [sender])
        if logged is None:
            raise MissingFromInbox(
                f"replay needs {key} of global rank {sender}, which is not in its log"
            )
        return logged[0]


class BatchTap:
    """Logs every batch drawn in a training step; draws it again from the log in replay and after an
    abort.
    """

    def __init__(self, cursor: Cursor, log: InboxLog) -> None:
        self._cursor, self._log = cursor, log
        self._drawn: Counter[tuple[int, int]] = Counter()
        self._anew: Counter[int] | None = None
        self._first = self._per_iteration = 0
        self.newest = 0
        """The newest iteration of which batches were drawn, here or by a predecessor."""

    def begin_anew(self, first: int, per_iteration: int) -> None:
        """What a predecessor drew is lost with its node: the iterators begin with its batches.

        Args:
            first: the iteration whose batches come first.
            per_iteration: batches that a chunk draws in each.
        """
        self._anew, self._first, self._per_iteration = Counter(), first, per_iteration

    def draw(self, chunk: int, draw: Callable[[], Any]) -> Any:
        """Stands around `next` of a training data iterator."""
        if self._cursor.mode is Mode.OFF or self._cursor.small_talk:
            return draw()
        iteration = self._cursor.iteration
        key = BatchKey(iteration, chunk, self._cursor.take(f"batch/{chunk}"))
        known = iteration < self.newest or key.microbatch < self._drawn[iteration, chunk]
        if self._anew is not None:
            drawn, known = self._draw_up_to(key, self._anew, draw), True
            if drawn is not None:
                return drawn
        if self._cursor.mode is Mode.REPLAY or known:
            batch = self._log.read_state(key)
            if batch is None:
                raise MissingFromInbox(f"replay needs {key}, which is not in this rank's log")
            return batch
        batch = draw()
        self._log.write_state(key, batch)
        self._drawn = Counter(
            {(iteration, c): n for (i, c), n in self._drawn.items() if i == iteration}
        )
        self._drawn[iteration, chunk], self.newest = key.microbatch + 1, iteration
        return batch

    def _draw_up_to(self, key: BatchKey, drawn: Counter[int], draw: Callable[[], Any]) -> Any:
        """Draws and logs what comes before a batch, and the batch itself, which is returned; None
        if it was drawn before.
        """
        wanted = (key.iteration - self._first) * self._per_iteration + key.microbatch
        batch = None
        while drawn[key.chunk] <= wanted:
            further, microbatch = divmod(drawn[key.chunk], self._per_iteration)
            batch = draw()
            self._log.write_state(BatchKey(self._first + further, key.chunk, microbatch), batch)
            drawn[key.chunk] += 1
        return batch


@contextmanager
def at(cursor: Cursor, mode: Mode, iteration: int, progress: Progress) -> Iterator[None]:
    """Moves the cursor for a nested stretch (replay, evaluation) and puts everything back
    afterwards.
    """
    before = (cursor.mode, cursor.iteration, cursor.progress, cursor.counts)
    cursor.mode, cursor.iteration, cursor.progress, cursor.counts = (
        mode,
        iteration,
        progress,
        Counter(),
    )
    try:
        yield
    finally:
        cursor.mode, cursor.iteration, cursor.progress, cursor.counts = before
