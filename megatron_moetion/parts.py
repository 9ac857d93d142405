"""Parts of operators: which elements of their tensors a capture holds. Pure.

An operator that alone is too large for a frame is captured in full in several parts, in several
frames. A part means the same stretch of every parameter's shard, whatever the shard's length, and
of every optimizer tensor of that length. Optimizers that work element by element never mix them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched, chain
from typing import Any, NamedTuple


class Stretch(NamedTuple):
    """Consecutive elements of a flat tensor.

    Attributes:
        start: the first one.
        end: the one behind the last.
    """

    start: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, order=True)
class Part:
    """Part `index` of `count` even ones of an operator's full state; by default all of it."""

    operator: str
    index: int = 0
    count: int = 1

    def stretch(self, numel: int) -> Stretch:
        """What of a flat tensor of `numel` elements belongs to this part; may be empty."""
        return Stretch(numel * self.index // self.count, numel * (self.index + 1) // self.count)

    def to_json(self) -> list[str | int]:
        return [self.operator, self.index, self.count]

    @classmethod
    def from_json(cls, row: Sequence[Any]) -> Part:
        operator, index, count = row
        return cls(operator, index, count)


def complete(parts: Iterable[Part]) -> frozenset[str]:
    """The operators of which all parts of one count are there."""
    found = Counter((part.operator, part.count) for part in frozenset(parts))
    return frozenset(operator for (operator, count), n in found.items() if n == count)


def missing(parts: Iterable[Part], numel: int) -> list[Stretch]:
    """What of a tensor of `numel` elements is in none of an operator's parts, in order."""
    gaps, reached = [], 0
    for start, end in sorted(part.stretch(numel) for part in parts):
        if start > reached:
            gaps.append(Stretch(reached, start))
        reached = max(reached, end)
    return [*gaps, Stretch(reached, numel)] if reached < numel else gaps


def covered(parts: Iterable[Part], numel: int) -> list[Stretch]:
    """What of a tensor of `numel` elements is in at least one of an operator's parts, in order."""
    edges = [0, *chain.from_iterable(missing(parts, numel)), numel]
    return [Stretch(start, end) for start, end in batched(edges, 2) if start < end]


def within(stretches: Sequence[Stretch], limits: Stretch) -> list[Stretch]:
    """The stretches as far as they lie inside `limits`; none of them empty."""
    cut = [Stretch(max(s.start, limits.start), min(s.end, limits.end)) for s in stretches]
    return [stretch for stretch in cut if stretch.numel > 0]
