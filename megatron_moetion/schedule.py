"""The capture schedule: which operators are captured in full in which iteration. Pure.

Paper section 3.5 (Algorithm 1: order, window, slots); the rolling policy is ours: design section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

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
    """

    policy: WindowPolicy
    slots: tuple[tuple[Part, ...], ...]
    first: int = 1

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
        next may already be under way.
        """
        return self.window * (1 if self.policy is WindowPolicy.ROLLING else 2) + 2

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


def generate(
    units: Sequence[Unit], window: int, policy: WindowPolicy, split: int = 0, first: int = 1
) -> Schedule:
    """Cuts ordered operators into `window` consecutive slots, balanced by parameters, not by count.

    Slots may be empty when there are fewer parts than frames in a window, which keeps windows of
    all stages aligned.

    Args:
        units: in capture order.
        split: no part holds more than 1/split of all parameters (rounded up); 0 splits nothing.
            An operator whose parts all come to the same slot stays whole.
        first: the iteration that opens the first window.
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
    return Schedule(policy, tuple(tuple(s) for s in slots), first)


def _parts(unit: Unit, largest: int) -> list[Part]:
    count = max(1, -(-unit.numel // max(largest, 1)))
    return [Part(unit.name, index, count) for index in range(count)]


def _slot(before: int, stretch: Stretch, window: int, total: int) -> int:
    """Where the middle of a stretch falls; in whole numbers, as peers must agree."""
    doubled = 2 * before + stretch.start + stretch.end
    return min(window - 1, doubled * window // (2 * total)) if total else 0
