"""What a job does between two training steps and can do again as a whole: evaluating, saving.

Nothing of it is logged. When a peer is lost inside, everybody leaves it, puts back what there was
before, recovers, and does it again from its start, with the batches that were drawn the first time.
A replacement comes out of its training step with the logged result and finds the others there.

Nobody goes on before everybody is through: a rank logs how things stand behind it, says so, and
waits for all others. So what has to be done again follows from what the leader heard of all ranks,
and every rank comes to the same answer.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_moetion.host import Host, State
from megatron_moetion.inbox.key import InterludeKey
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.inbox.tap import Cursor, Mode
from megatron_moetion.recovery.failure import is_communication_error
from megatron_moetion.recovery.plan import NothingToRebuildFrom, Position
from megatron_moetion.recovery.waiting import Waits

ENDED = "ended"
"""A place for faults: an interlude is over on this rank, and the others have not heard of it."""


def over(positions: Iterable[Position], iteration: int, number: int) -> bool:
    """Whether every rank has been through the `number`-th interlude after an iteration, so that
    nobody does it again.

    Args:
        positions: as the newest recovery found them; none if there was no recovery.
    """
    found = [position.ended > (iteration, number) for position in positions]
    return bool(found) and all(found)


@dataclass(frozen=True)
class Interlude:
    """One call of the host's.

    Attributes:
        name: what it is; also the place for faults inside.
        run: makes the call; what the host would print goes to the function that it is given.
        say: prints such a line.
        iterators: it draws batches from these; None where a rank reads no data.
        skip: has one of them move by a batch.
        note: how things outside of the job stand before it. With it, what is done to them counts.
        again: asked on global rank 0 before another attempt, with that note: makes undone what was
            half done; returns whether all was done, so that there is no other attempt.
    """

    name: str
    run: Callable[[Callable[[str], None]], None]
    say: Callable[[str], None] = print
    iterators: Sequence[Any] = ()
    skip: Callable[[Any], object] = next
    note: Callable[[], State] | None = None
    again: Callable[[State], bool] | None = None


class Gate(Protocol):
    """What an interlude asks of the session."""

    @property
    def position(self) -> Position: ...

    def positions(self) -> Iterable[Position]:
        """Of all ranks, as the newest recovery found them."""

    def pause(self, error: Exception) -> None:
        """Recovers in place; returns when the job goes on."""

    def ended(self, iteration: int, count: int) -> None:
        """Tells that the first `count` interludes after an iteration are over here.

        Raises:
            Interrupted: a peer was lost before that.
        """

    def told(self, iteration: int, count: int) -> None:
        """Tells that what they say has been written."""

    def reached(self, place: str, microbatch: int | None = None) -> None:
        """A fault may fire here."""

    def aside(self, name: str) -> AbstractContextManager[None]:
        """How long this takes says nothing of what iterations take."""

    def hopeless(self, reason: str) -> None:
        """Has the job end."""


@dataclass
class _Stay:
    """This rank in an interlude, over all attempts.

    Attributes:
        drawn: what each iterator gave, to be given again.
        used: how many of these this attempt has had.
        counts: places for faults that this attempt has passed.
        lines: what this attempt would print.
    """

    interlude: Interlude
    iteration: int
    number: int
    drawn: list[list[Any]] = field(default_factory=list)
    used: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drawn = [[] for _ in self.interlude.iterators]

    def begin(self) -> None:
        self.used, self.counts, self.lines = Counter(), Counter(), []

    def key(self, what: str) -> InterludeKey:
        return InterludeKey(self.iteration, self.number, what)

    def draw(self, iterator: Any, draw: Callable[[], Any]) -> Any:
        found = [i for i, known in enumerate(self.interlude.iterators) if known is iterator]
        if not found:
            return draw()
        index = found[0]
        drawn, used = self.drawn[index], self.used[index]
        self.used[index] += 1
        if used == len(drawn):
            drawn.append(draw())
        # The host may change what it is given.
        return copy.deepcopy(drawn[used])

    def move_on(self, used: Sequence[int]) -> None:
        """Has the iterators stand where an attempt of a predecessor has left them."""
        for iterator, drawn, count in zip(self.interlude.iterators, self.drawn, used, strict=True):
            for _ in range(count - len(drawn)):
                self.interlude.skip(iterator)


class Interludes:
    """This rank's interludes."""

    def __init__(self, cursor: Cursor, log: InboxLog, host: Host, waits: Waits, gate: Gate) -> None:
        self._cursor, self._log, self._host = cursor, log, host
        self._waits, self._gate = waits, gate
        self._stay: _Stay | None = None

    @property
    def inside(self) -> bool:
        """Whether this rank is in one at present."""
        return self._stay is not None

    def count(self, place: str) -> None:
        """A fault may fire here, if this is inside an interlude of that name."""
        stay = self._stay
        if stay is not None and stay.interlude.name == place:
            stay.counts[place] += 1
            self._gate.reached(place, stay.counts[place] - 1)

    def draw(self, iterator: Any, draw: Callable[[], Any]) -> Any:
        """Stands around `next` of a data iterator."""
        assert self._stay is not None
        return self._stay.draw(iterator, draw)

    def run(self, interlude: Interlude) -> None:
        """Stands around the host's call. It is over everywhere when this returns."""
        stay = _Stay(interlude, self._cursor.iteration, self._cursor.take("interlude"))
        start = self._host.interlude_state()
        while not over(self._gate.positions(), stay.iteration, stay.number):
            try:
                self._attempt(stay)
            except Exception as error:
                if not is_communication_error(error):
                    raise
                self._leave(error, start)
            else:
                break
        else:
            self._catch_up(stay)
        if self._gate.position.told <= (stay.iteration, stay.number):
            for line in stay.lines:
                interlude.say(line)
            self._gate.told(stay.iteration, stay.number + 1)

    def _attempt(self, stay: _Stay) -> None:
        stay.begin()
        self._stay, self._cursor.mode = stay, Mode.OFF
        try:
            if not self._is_done(stay):
                with self._gate.aside(stay.interlude.name):
                    stay.interlude.run(stay.lines.append)
            used = [stay.used[index] for index in range(len(stay.drawn))]
            state = {"state": self._host.start_state(), "used": used, "lines": stay.lines}
            self._log.write_state(stay.key("end"), state)
            self._gate.ended(stay.iteration, stay.number + 1)
            self._gate.reached(ENDED, stay.number)
            dist.barrier()
        finally:
            self._stay, self._cursor.mode = None, Mode.LIVE

    def _is_done(self, stay: _Stay) -> bool:
        """Whether an earlier attempt has done all that there is to do outside of the job."""
        note, again = stay.interlude.note, stay.interlude.again
        if note is None or again is None:
            return False
        done = False
        if dist.get_rank() == 0:
            before = self._log.read_state(stay.key("note"))
            if before is None:
                self._log.write_state(stay.key("note"), note())
            else:
                done = again(before)
        told = torch.tensor([int(done)], device=self._host.device)
        dist.all_reduce(told)
        return bool(told.item())

    def _leave(self, error: Exception, start: State) -> None:
        self._waits.settle()
        # The traceback holds activations.
        traceback.clear_frames(error.__traceback__)
        self._host.reset_after_abort()
        # A replay inside needs the model in training mode.
        self._host.load_interlude_state(start)
        self._gate.pause(error)

    def _catch_up(self, stay: _Stay) -> None:
        """This rank, or the worker whose place it takes, has been through all of it before."""
        end = self._log.read_state(stay.key("end"))
        if end is None:
            reason = f"what rank {dist.get_rank()} logged under {stay.key('end')} is gone"
            self._gate.hopeless(reason)
            raise NothingToRebuildFrom(reason)
        stay.move_on(end["used"])
        self._host.take_over(end["state"])
        stay.lines = list(end["lines"])
