"""How popular each expert is, from its router's counts; what `schedule.order` sorts by. Pure.

The paper's default is the hard count over a window of iterations (section 3.5); its appendix B
compares three alternatives. Their definitions are not at hand: these here are read from their
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

CHANGE = 0.1
"""An expert's frequency has changed when it is more than this part of itself away from before."""
ENOUGH = 0.25
"""The part of the experts that must have changed for a new order (paper section 3.5)."""


@dataclass(frozen=True)
class Load:
    """What a router gave one expert in one iteration.

    Attributes:
        tokens: how many it sent there.
        gates: the sum of the probabilities that it gave the expert, over all tokens.
        capacity: how many tokens the expert takes at most; any further ones are dropped.
    """

    tokens: int
    gates: float = 0.0
    capacity: float = inf


History = Sequence[Mapping[str, Load]]
"""By iteration, oldest first: the load of every expert, by operator name.

Data-parallel peers must be given the same numbers, summed over all of them.
"""


class Measure(Protocol):
    """One way to say how popular experts are; only the order of the results means something."""

    def __call__(self, history: History) -> dict[str, float]:
        """Popularity by operator name, of all experts in the history."""


def hard_count(history: History) -> dict[str, float]:
    """Tokens sent; the paper's default."""
    return _sum(history, lambda load, age: load.tokens)


def soft_count(history: History) -> dict[str, float]:
    """Probabilities given: tokens that an expert just missed count too."""
    return _sum(history, lambda load, age: load.gates)


def capacity_aware(history: History) -> dict[str, float]:
    """Tokens worked on: those beyond an expert's capacity cost it nothing."""
    return _sum(history, lambda load, age: min(load.tokens, load.capacity))


@dataclass(frozen=True)
class TimeDecayed:
    """Tokens sent, those of each iteration counting less than those of the next.

    Attributes:
        half_life: iterations after which a token counts half.
    """

    half_life: float = 20.0

    def __call__(self, history: History) -> dict[str, float]:
        return _sum(history, lambda load, age: load.tokens * 0.5 ** (age / self.half_life))


time_decayed = TimeDecayed()

MEASURES: Mapping[str, Measure] = {
    "hard-count": hard_count,
    "soft-count": soft_count,
    "time-decayed": time_decayed,
    "capacity-aware": capacity_aware,
}
"""By the name that a user gives."""


class _Weight(Protocol):
    def __call__(self, load: Load, age: int) -> float: ...


def _sum(history: History, weight: _Weight) -> dict[str, float]:
    found: dict[str, float] = {}
    for age, loads in zip(range(len(history) - 1, -1, -1), history, strict=True):
        for name, load in loads.items():
            found[name] = found.get(name, 0.0) + weight(load, age)
    return found


def needs_reorder(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether enough experts are used more or less often than when they were put in order.

    Args:
        before: popularity that the present order was made from.
        now: popularity by the same measure. Only shares are compared, so the two may cover
            different numbers of iterations.
    """
    names = before.keys() | now.keys()
    old, new = _shares(before), _shares(now)
    changed = sum(abs(new.get(n, 0.0) - old.get(n, 0.0)) > CHANGE * old.get(n, 0.0) for n in names)
    return bool(names) and changed >= ENOUGH * len(names)


def _shares(popularity: Mapping[str, float]) -> dict[str, float]:
    total = sum(popularity.values())
    return {name: value / total if total else 0.0 for name, value in popularity.items()}
