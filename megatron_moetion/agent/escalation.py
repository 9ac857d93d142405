"""Which tier is tried against a failure: pure decisions, told the time of one clock.

Localized recoveries are free as long as they are few: `RestartBudget` says how many within how
long. Past it, and where a localized recovery has not helped, the next tier is tried: all workers
anew from memory, then from the newest spill, then from the host's own checkpoint. A step that was
taken is remembered for as long as the budget looks back, so none is taken twice in that time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from megatron_moetion.config import RestartBudget


class Tier(StrEnum):
    """What can be done against a failure; each is tried where the one before has not helped."""

    LOCALIZED = "localized recovery"
    MEMORY = "memory restart"
    SPILL = "spill"
    CHECKPOINT = "Megatron checkpoint"

    @property
    def next(self) -> Tier:
        """The tier below; that of the last one is itself."""
        tiers = list(Tier)
        return tiers[min(tiers.index(self) + 1, len(tiers) - 1)]


@dataclass(frozen=True)
class Tried:
    """What was done of late.

    Attributes:
        recoveries: when localized recoveries began.
        steps: tiers below that were tried, and when.
    """

    recoveries: tuple[float, ...] = ()
    steps: tuple[tuple[Tier, float], ...] = ()

    def within(self, seconds: float, now: float) -> Tried:
        """What of it is not longer ago."""
        recoveries = tuple(at for at in self.recoveries if now - at <= seconds)
        return Tried(
            recoveries, tuple((tier, at) for tier, at in self.steps if now - at <= seconds)
        )

    @property
    def lowest(self) -> Tier:
        """The lowest tier that was tried."""
        return max((tier for tier, _ in self.steps), key=list(Tier).index, default=Tier.LOCALIZED)

    @property
    def since_step(self) -> int:
        """Localized recoveries since another tier was tried."""
        last = max((at for _, at in self.steps), default=float("-inf"))
        return sum(at >= last for at in self.recoveries)

    def with_step(self, tier: Tier, now: float) -> Tried:
        """Another tier is tried; recoveries are counted anew from there."""
        return replace(self, steps=(*self.steps, (tier, now)))

    def to_json(self) -> list[Any]:
        return [self.recoveries, self.steps]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Tried:
        recoveries, steps = data
        return cls(tuple(recoveries), tuple((Tier(tier), at) for tier, at in steps))

    def __str__(self) -> str:
        """The tiers, for the line with which a job ends."""
        num = len(self.recoveries)
        told = [f"{num} localized recover{'y' if num == 1 else 'ies'}"] * (num > 0)
        for tier in (Tier.MEMORY, Tier.SPILL, Tier.CHECKPOINT):
            times = sum(step is tier for step, _ in self.steps)
            told += [str(tier) if times == 1 else f"{times} {tier}s"] * (times > 0)
        return ", ".join(told) or "no tier"


NOTHING_TRIED = Tried()


def after_failure(tried: Tried, now: float, budget: RestartBudget) -> tuple[Tried, Tier | None]:
    """What is tried against a failure in training.

    Args:
        tried: before it.
        now: seconds of the clock that `tried` is in.

    Returns:
        What was tried with that, and the tier; None where the last one was tried, too. That there
        is a spill or a checkpoint is not known here.
    """
    known = tried.within(budget.seconds, now)
    if known.since_step < budget.num:
        return replace(known, recoveries=(*known.recoveries, now)), Tier.LOCALIZED
    if known.lowest is Tier.CHECKPOINT:
        return known, None
    tier = known.lowest.next
    return (known.with_step(tier, now) if tier is Tier.MEMORY else known), tier
