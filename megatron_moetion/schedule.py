"""The capture schedule: which operators are captured in full in which iteration. Pure.

Paper section 3.5 (Algorithm 1: order, window, slots); the rolling policy is ours: design section 5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

from megatron_moetion.operators import Kind
from megatron_moetion.parts import Part, Stretch, complete


class WindowPolicy(StrEnum):
    """`rolling`: all operators are in every frame; `tumbling`: none after its full capture."""

    ROLLING = "rolling"
    TUMBLING = "tumbling"


@dataclass(frozen=True)
class Unit:
    """What the schedule needs to know of an operator; `numel` as in `operators.Operator`."""

    name: str
    kind: Kind
    numel: int


@dataclass(frozen=True)
class FramePlan:
    """What one frame holds; in capture order.

    Attributes:
        full: operators captured in full, or parts of them.
        light: operators of which only the compute weights are captured. One that is in `full` with
            some of its parts stands here too: its other elements are needed from here.
        skipped: all others, full earlier in this window; named so that a frame tells what it lacks.
    """

    full: tuple[Part, ...]
    light: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Slots of parts; slot k of a window is captured in full in its k-th frame.

    Attributes:
        policy: rolling or tumbling.
        slots: parts by slot; all parts of every operator are there once, those of one operator in
            ascending order.
        first: the iteration whose frame is slot 0 of the first window; the frame of the iteration
            before the first of a job is dense.
        reorders: the windows behind this one may be in another order, see `reordered`.
        before: how many windows of the job came before `first`.
    """

    policy: WindowPolicy
    slots: tuple[tuple[Part, ...], ...]
    first: int = 1
    reorders: bool = False
    before: int = 0

    @property
    def window(self) -> int:
        return len(self.slots)

    def slot_of(self, iteration: int) -> int:
        """The place of an iteration's frame in its window, from 0."""
        return (iteration - self.first) % self.window

    def frame(self, iteration: int) -> FramePlan:
        """What the frame of `iteration` captures."""
        return self.frame_of_slot(self.slot_of(iteration))

    def frame_of_slot(self, slot: int) -> FramePlan:
        """What the frames in one place of a window capture.

        An operator is light until its last part is in; under the rolling policy in each frame that
        does not hold all of it.
        """
        full = self.slots[slot]
        here, last = complete(full), self._last_slots()
        if self.policy is WindowPolicy.ROLLING:
            return FramePlan(full, tuple(n for n in last if n not in here))
        light = tuple(n for n, k in last.items() if k > slot)
        return FramePlan(full, light, tuple(n for n, k in last.items() if k < slot))

    def _last_slots(self) -> dict[str, int]:
        """The slot of every operator's last part; operators in capture order."""
        return {part.operator: k for k, parts in enumerate(self.slots) for part in parts}

    @property
    def split(self) -> dict[str, int]:
        """The operators that are captured in parts, and in how many."""
        parts = (part for parts in self.slots for part in parts)
        return {part.operator: part.count for part in parts if part.count > 1}

    @property
    def dense(self) -> FramePlan:
        """A frame that holds everything in full."""
        return FramePlan(tuple(Part(name) for name in self._last_slots()), ())

    @property
    def frames_kept(self) -> int:
        """How many newest frames a rank keeps, so that a base exists at any instant.

        Two more than a base and its catch-up need: peers may have sealed one frame less, and the
        next may already be under way. A new order may put an operator one frame later, which
        matters where a base reaches over the edge of a window.
        """
        if self.policy is WindowPolicy.TUMBLING:
            return 2 * self.window + 2
        return self.window + 2 + self.reorders

    def closes_at(self, iteration: int) -> bool:
        """Whether this iteration's frame is the last of a window."""
        return self.slot_of(iteration) == self.window - 1

    def number(self, iteration: int) -> int:
        """Which window of the job an iteration's frame belongs to, from 1."""
        return self.before + (iteration - self.first) // self.window + 1

    def followed_by(self, after: Schedule) -> Schedule:
        """`after` with its place in the job: it opens where a window of this one has closed."""
        return replace(after, before=self.number(after.first - 1))

    def reordered(self, experts: Sequence[str], first: int) -> Schedule:
        """The same slots with other experts in the places of experts, as near to an order as one
        window can come to it.

        No expert moves to a later slot than the next one: then W + 1 frames that reach over the
        edge between both are complete, where any W are without a new order. Whoever asks at every
        edge gets there. All other operators stay where they are, which ranks that share them but
        have other experts rely on.

        Args:
            experts: whole operators of equal size, in the order that is wanted.
            first: the iteration that opens the first window in the new order.
        """
        wanted = set(experts)
        places = [sum(part.operator in wanted for part in parts) for parts in self.slots]
        before = {part.operator: k for k, parts in enumerate(self.slots) for part in parts}
        taken = iter(_move(experts, before, places))
        slots = tuple(
            tuple(Part(next(taken)) if part.operator in wanted else part for part in parts)
            for parts in self.slots
        )
        return replace(self, slots=slots, first=first)

    def to_json(self) -> dict[str, Any]:
        """Plain containers, for the log."""
        slots = [[list(part.to_json()) for part in parts] for parts in self.slots]
        return {
            "policy": self.policy.value,
            "slots": slots,
            "first": self.first,
            "reorders": self.reorders,
            "before": self.before,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Schedule:
        slots = tuple(tuple(Part.from_json(row) for row in parts) for parts in fields["slots"])
        policy = WindowPolicy(fields["policy"])
        return cls(policy, slots, fields["first"], fields["reorders"], fields["before"])

    @property
    def lag_bound(self) -> int:
        """By how many frames copies on other nodes may lag; so many more are kept with copies.

        Rolling frames are about equal, and one is always on its way. Tumbling ones shrink from slot
        to slot, and a network that carries their mean is behind by up to a quarter of a window.
        """
        return 1 if self.policy is WindowPolicy.ROLLING else 1 + -(-self.window // 4)


def order(units: Sequence[Unit], popularity: Mapping[str, float] | None = None) -> tuple[Unit, ...]:
    """Capture order: coldest experts first, routers and layers last (paper section 3.5).

    An operator captured late stays frozen longer in replay, and a frozen one is cheaper, so the
    expensive ones come last. Ties are broken by name: data-parallel peers must agree.
    """
    counts = popularity or {}
    rank = {kind: index for index, kind in enumerate(Kind)}
    return tuple(sorted(units, key=lambda u: (rank[u.kind], counts.get(u.name, 0.0), u.name)))


def _move(wanted: Sequence[str], before: Mapping[str, int], places: Sequence[int]) -> Iterator[str]:
    """Fills places slot by slot with what is wanted first, nobody later than one slot after its
    own.

    Whoever comes earlier than before pushes somebody out of each slot in between, and no slot can
    take in more of those than it has places.
    """
    left, early = list(wanted), Counter[int]()
    for slot, count in enumerate(places):
        due = [name for name in left if before[name] < slot]
        for name in due:
            left.remove(name)
            yield name
        for _ in range(count - len(due)):
            name = next(
                name
                for name in left
                if all(early[k] < places[k + 1] for k in range(slot, before[name]))
            )
            early.update(range(slot, before[name]))
            left.remove(name)
            yield name


def generate(
    units: Sequence[Unit],
    window: int,
    policy: WindowPolicy,
    split: int = 0,
    first: int = 1,
    reorders: bool = False,
) -> Schedule:
    """Cuts ordered operators into `window` consecutive slots, balanced by parameters, not by count.

    Slots may be empty when there are fewer parts than frames in a window, which keeps windows of
    all stages aligned.

    Args:
        units: in capture order.
        split: no part holds more than 1/split of all parameters (rounded up); 0 splits nothing.
            An operator whose parts all come to the same slot stays whole.
        first: the iteration that opens the first window.
        reorders: see `Schedule`.
    """
    total = sum(u.numel for u in units)
    slots: list[list[Part]] = [[] for _ in range(window)]
    before = 0
    for unit in units:
        places = [
            (_slot(before, part.stretch(unit.numel), window, total), part)
            for part in _parts(unit, -(-total // split) if split else total)
        ]
        before += unit.numel
        if places[0][0] == places[-1][0]:
            places = [(places[0][0], Part(unit.name))]
        for slot, part in places:
            slots[slot].append(part)
    return Schedule(policy, tuple(tuple(s) for s in slots), first, reorders)


def _parts(unit: Unit, largest: int) -> list[Part]:
    count = max(1, -(-unit.numel // max(largest, 1)))
    return [Part(unit.name, index, count) for index in range(count)]


def _slot(before: int, stretch: Stretch, window: int, total: int) -> int:
    """Where the middle of a stretch falls; in whole numbers, as peers must agree."""
    doubled = 2 * before + stretch.start + stretch.end
    return min(window - 1, doubled * window // (2 * total)) if total else 0


class Timeline:
    """By which schedule each iteration is captured: at the edge of a window it may change.

    All ranks make the same changes. What was captured by the schedule before is kept until the new
    one has frames enough of its own, so there is a base at any instant.

    Args:
        schedules: ascending by `first`; `to_json` of another timeline makes it whole again.
        copies: frames are kept longer, as their copies on other nodes may lag.
    """

    def __init__(self, schedules: Iterable[Schedule], copies: bool) -> None:
        self.schedules = list(schedules)
        self._copies = copies

    @property
    def newest(self) -> Schedule:
        return self.schedules[-1]

    def at(self, iteration: int) -> Schedule:
        """What the frame of `iteration` was or will be captured by; the oldest one knows all that
        came before.
        """
        began = (schedule for schedule in reversed(self.schedules) if schedule.first <= iteration)
        return next(began, self.schedules[0])

    def change(self, schedule: Schedule) -> None:
        """From `schedule.first` on; decided again after an abort, the later decision counts."""
        self.keep(schedule.first - 1)
        self.schedules.append(self.newest.followed_by(schedule))

    def keep(self, iteration: int) -> None:
        """There is no change behind `iteration`: takes one back that an abort made undone."""
        self.schedules = [s for s in self.schedules if s.first <= iteration] or [self.schedules[0]]

    def kept(self, schedule: Schedule) -> int:
        """How many newest frames a rank keeps with one schedule alone."""
        return schedule.frames_kept + (schedule.lag_bound if self._copies else 0)

    def oldest(self, iteration: int) -> int:
        """The oldest iteration whose frame and logs are needed when `iteration` begins."""
        oldest = iteration - self.kept(self.at(iteration))
        for schedule, after in zip(self.schedules[-2::-1], self.schedules[:0:-1], strict=True):
            if after.first > iteration or alike(schedule, after):
                continue
            if after.first > oldest:
                oldest = min(oldest, after.first - self.kept(schedule))
        return oldest

    def forget(self, iteration: int) -> bool:
        """Forgets schedules of frames that are older than `oldest(iteration)`.

        Returns:
            Whether frames of another size than the present ones have come to their end.
        """
        oldest = self.oldest(iteration)
        before = self.schedules
        ended = [s for s, after in pairwise(before) if after.first <= oldest]
        self.schedules = before[len(ended) :]
        return any(not alike(schedule, self.schedules[0]) for schedule in ended)

    @property
    def steady(self) -> bool:
        """Whether all frames that are kept are captured alike, but for the order of experts."""
        return all(alike(a, b) for a, b in pairwise(self.schedules))

    def to_json(self) -> list[dict[str, Any]]:
        """For the log: what a replacement needs to go on."""
        return [schedule.to_json() for schedule in self.schedules]


def alike(a: Schedule, b: Schedule) -> bool:
    """Whether two schedules differ in the order of experts at most."""
    return (a.policy, a.window, a.split) == (b.policy, b.window, b.split)
