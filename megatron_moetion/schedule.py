"""The capture schedule: which operators are captured in full in which iteration. Pure.

Paper section 3.5 (Algorithm 1: order, window, slots); the rolling policy is ours: design section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_moetion.operators import Kind


class WindowPolicy(StrEnum):
    """`rolling`: all operators are in every frame; `tumbling`: none after its full capture."""

    ROLLING = "rolling"
    TUMBLING = "tumbling"


@dataclass(frozen=True)
class Unit:
    """What the schedule needs to know of an operator; `numel` counts whole parameters."""

    name: str
    kind: Kind
    numel: int


@dataclass(frozen=True)
class FramePlan:
    """What one frame holds; names in capture order.

    Attributes:
        full: operators captured in full.
        light: operators of which only the compute weights are captured.
        skipped: all others, full earlier in this window; named so that a frame tells what it lacks.
    """

    full: tuple[str, ...]
    light: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Slots of operators; slot k of a window is captured in full in its k-th frame.

    Attributes:
        policy: rolling or tumbling.
        slots: operator names by slot; every operator is in exactly one slot.
    """

    policy: WindowPolicy
    slots: tuple[tuple[str, ...], ...]

    @property
    def window(self) -> int:
        return len(self.slots)

    def slot_of(self, iteration: int) -> int:
        """Iteration 1 opens the first window; the frame of iteration 0 is dense."""
        return (iteration - 1) % self.window

    def frame(self, iteration: int) -> FramePlan:
        """What the frame of `iteration` (>= 1) captures."""
        slot = self.slot_of(iteration)
        others = [(k, n) for k, names in enumerate(self.slots) if k != slot for n in names]
        first_light = 0 if self.policy is WindowPolicy.ROLLING else slot + 1
        light = tuple(n for k, n in others if k >= first_light)
        return FramePlan(self.slots[slot], light, tuple(n for k, n in others if k < first_light))

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


def generate(units: Sequence[Unit], window: int, policy: WindowPolicy) -> Schedule:
    """Cuts ordered operators into `window` consecutive slots, balanced by parameters, not by count.

    Slots may be empty when there are fewer operators than frames in a window, which keeps windows
    of all stages aligned.
    """
    total = sum(u.numel for u in units)
    slots: list[list[str]] = [[] for _ in range(window)]
    before = 0
    for unit in units:
        middle = before + unit.numel / 2
        slots[min(window - 1, int(middle * window / total) if total else 0)].append(unit.name)
        before += unit.numel
    return Schedule(policy, tuple(tuple(s) for s in slots))
