"""The tiers below memory: what cannot be rebuilt there starts anew from what is on disk.

The agents replace themselves, so that nothing of the failed run is left: no thread, no socket, no
memory. They meet again and start from the newest spill as after any cold start, or have the host
load its own checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NoReturn

from megatron_moetion.agent.escalation import NOTHING_TRIED, Tier, Tried

VARIABLE = "MOETION_FALL_BACK"


@dataclass(frozen=True, order=True)
class Source:
    """What a job may begin from; of two that there are, the greater one is better.

    Attributes:
        iteration: whose state it is.
        is_spill: a spill, and not the host's own checkpoint.
    """

    iteration: int
    is_spill: bool

    @property
    def tier(self) -> Tier:
        """What it is to begin from it."""
        return Tier.SPILL if self.is_spill else Tier.CHECKPOINT

    def __str__(self) -> str:
        return f"the {self.tier} of iteration {self.iteration}"


AFRESH = Source(0, False)


@dataclass(frozen=True)
class Begun:
    """What a job has begun from, before it fell back and since.

    Attributes:
        highest: the best of all that it has begun from, or was to.
        last: what the run under way began from.
    """

    highest: Source = AFRESH
    last: Source = AFRESH

    def next(self, sources: Iterable[Source]) -> Source | None:
        """What it may begin from next: what is better than all before, as training has come further
        than ever, or else what is worse than the last. So there is an end to it where training
        comes no further: without progress it only ever goes back.
        """
        allowed = [source for source in sources if source > self.highest or source < self.last]
        return max(allowed, default=None)


BEGUN_AFRESH = Begun()


@dataclass(frozen=True)
class Limit:
    """What may be begun from once all begin again.

    Attributes:
        best: what the leader has chosen; where that is not sound, what is worse will do.
        highest: see `Begun`; that one counted.
    """

    best: Source
    highest: Source

    def allows(self, source: Source) -> bool:
        """Whether it may be begun from. A checkpoint may just have been named that is newer than
        all: workers go on until they are told.
        """
        return source <= self.best or (source > self.highest and not source.is_spill)

    def to_json(self) -> list[Any]:
        """For other agents."""
        return [astuple(self.best), astuple(self.highest)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Limit:
        """Inverse of `to_json`."""
        best, highest = data
        return cls(Source(*best), Source(*highest))


@dataclass(frozen=True)
class Stored:
    """What one node finds on disk, for all to begin from.

    Attributes:
        spills: iterations of those that it holds its part of.
        checkpoint: iteration of the host's own that the command line would load.
    """

    spills: tuple[int, ...] = ()
    checkpoint: int | None = None


def next_source(
    begun: Begun, stored: Stored, spilled: int | None, tier: Tier, distrusted: bool
) -> Source | None:
    """What a job begins anew from whose state is lost; None if nothing would help.

    Args:
        spilled: iteration of the newest spill that this job has made, valid on every node.
        tier: the first one that may help.
        distrusted: what came of its state was rejected, so an older spill may be better.
    """
    spills = set() if spilled is None else {spilled}
    if distrusted:
        spills |= {iteration for iteration in stored.spills if iteration < begun.last.iteration}
    sources = [Source(iteration, True) for iteration in spills if tier is not Tier.CHECKPOINT]
    if stored.checkpoint is not None:
        sources.append(Source(stored.checkpoint, False))
    return begun.next(sources)


@dataclass(frozen=True)
class FallBack:
    """Why an agent begins again.

    Attributes:
        limit: what to begin from.
        fired: scripted faults that have been injected, by index.
        node_rank: of an agent that stood by when it was started and has had a place since; None
            leaves it to the command line.
        tried: against failures so far, in times of the clock that all processes of a host share.
        distrusted: the host has rejected what came of the state, so what is read is looked through.
    """

    limit: Limit
    fired: tuple[int, ...] = ()
    node_rank: int | None = None
    tried: Tried = NOTHING_TRIED
    distrusted: bool = False

    def to_json(self) -> list[Any]:
        """For the other agents, and for this one when it begins again."""
        told = [self.fired, self.node_rank, self.tried.to_json(), self.distrusted]
        return [self.limit.to_json(), *told]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> FallBack:
        """Inverse of `to_json`."""
        limit, fired, node_rank, tried, distrusted = data
        told = (node_rank, Tried.from_json(tried), distrusted)
        return cls(Limit.from_json(limit), tuple(fired), *told)


def way_on(source: Source | None, protected: bool) -> str:
    """What is intact when a job ends, for the end of the line that says why.

    Args:
        source: what the same command would go on from.
        protected: the job had --moetion.
    """
    if source is not None:
        return f"; the same command goes on from {source}"
    return "; restart from a Megatron checkpoint with --load, or afresh" if protected else ""


def best(spilled: int | None, checkpoint: int | None) -> Source | None:
    """What a command goes on from that is given again."""
    found = [] if spilled is None else [Source(spilled, True)]
    found += [] if checkpoint is None else [Source(checkpoint, False)]
    return max(found, default=None)


def inherited() -> FallBack | None:
    """What this process began again for, if it did; no child sees it."""
    told = os.environ.pop(VARIABLE, None)
    return None if told is None else FallBack.from_json(json.loads(told))


def begin_again(fall_back: FallBack) -> NoReturn:
    """Run this command from its beginning, as the same process; all children must have ended."""
    os.environ[VARIABLE] = json.dumps(fall_back.to_json())
    run_again()


def run_again() -> NoReturn:
    """Run this command from its beginning, as the same process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
