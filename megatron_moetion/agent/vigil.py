"""When the leader looks at all ranks, and what follows: a pure object, told the time.

It never polls. As long as the last look saw progress, the next one is due when the limit would have
passed since that progress; so a job that trains is looked at once in that time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from megatron_moetion.agent.hangs import (
    FEWEST_PAUSES,
    SHORTEST_OF_TIMEOUT,
    Limit,
    Observation,
    Verdict,
    here,
    judge,
    limit_of,
    trains,
)

PART = 4
"""A ping is waited for, and a late look excused, for this part of the limit."""


FINEST = 0.001
"""Seconds; what is left of a limit below that is no reason for another look."""


@dataclass(frozen=True)
class Look:
    """Ask all agents what they see of their ranks.

    Attributes:
        number: of the look.
        ping_seconds: 0 pings nobody; else how long the workers may take to answer.
    """

    number: int
    ping_seconds: float


@dataclass(frozen=True)
class Learned:
    """The limit is another than what was told last."""

    limit: Limit


@dataclass(frozen=True)
class Alarm:
    """The job hangs.

    Attributes:
        seen: observations of all ranks.
    """

    verdict: Verdict
    limit: Limit
    seen: tuple[Observation, ...]


@dataclass(frozen=True)
class Stubborn:
    """These were killed after an alarm and are still there."""

    culprits: tuple[Observation, ...]


@dataclass(frozen=True)
class Deaf:
    """These agents did not say what they see."""

    node_ranks: tuple[int, ...]


@dataclass(frozen=True)
class Inquired:
    """The answer to `Vigil.inquire`: of the ranks asked for, those that hang, with all seen."""

    culprits: tuple[Observation, ...]
    seen: tuple[Observation, ...]


Outcome = Look | Learned | Alarm | Stubborn | Deaf | Inquired


@dataclass
class _Looking:
    """A look under way.

    Attributes:
        about: ranks that have not answered in a recovery; None in training.
    """

    look: Look
    deadline: float
    about: frozenset[int] | None
    answers: dict[int, tuple[Observation, ...]] = field(default_factory=dict)


class Vigil:
    """The leader's watch over all ranks.

    Times are seconds of the leader's monotonic clock.

    Args:
        ranks: all global ranks.
        num_nodes: one agent each.
        factor: of --moetion-hang-factor; 0 looks only when asked to.
        timeout: of --moetion-timeout.
    """

    def __init__(
        self, ranks: Iterable[int], num_nodes: int, factor: float, timeout: timedelta, now: float
    ) -> None:
        self._ranks, self._num_nodes = frozenset(ranks), num_nodes
        self._factor, self._timeout = factor, timeout
        self._steady: set[int] = set()
        self._looking: _Looking | None = None
        self._number = 0
        self._told: Limit | None = None
        self._killed: frozenset[tuple[int, int]] = frozenset()
        self._watching = False
        self._since = self._next = now
        self.trains(now)

    @property
    def rule(self) -> str:
        """When there is an alarm, in words."""
        seconds = self._timeout.total_seconds()
        if not self._factor:
            return f"in a recovery only, after {seconds:g} s (--moetion-hang-factor 0)"
        return (
            f"after {self._factor:g} iterations without progress (--moetion-hang-factor), though"
            f" not before {seconds / SHORTEST_OF_TIMEOUT:g} s; before their time is known, and in"
            f" the first {FEWEST_PAUSES} evaluations and savings, after {seconds:g} s"
            " (--moetion-timeout)"
        )

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do; None while nothing is awaited."""
        if self._looking is not None:
            return self._looking.deadline
        return self._next if self._watching else None

    def trains(self, now: float) -> None:
        """Training begins, or goes on after a recovery."""
        self._steady.clear()
        self._watching = self._factor > 0
        self._since, self._next = now, now + self._timeout.total_seconds()
        self._looking, self._killed = None, frozenset()

    def ends(self) -> None:
        """A rank has finished: how long its peers take to leave says nothing."""
        self._factor = 0.0
        self.pauses()

    def pauses(self) -> None:
        """Training is over for now: a recovery has limits of its own."""
        self._watching, self._looking = False, None

    def steady(self, global_rank: int, now: float) -> list[Outcome]:
        """A rank has seen some usual iterations."""
        self._steady.add(global_rank)
        if self._steady < self._ranks or not self._watching or self._looking is not None:
            return []
        return [self._look(now, 0.0, None)]

    def inquire(self, about: Iterable[int], now: float) -> list[Outcome]:
        """Look at once, to tell who of these ranks keeps the others from answering."""
        seconds = self._timeout.total_seconds() / PART**2
        return [self._look(now, seconds, frozenset(about))]

    def tick(self, now: float) -> list[Outcome]:
        """Called when `deadline` is over."""
        if self._looking is not None:
            return self._conclude(now) if now >= self._looking.deadline else []
        if not self._watching or now < self._next:
            return []
        limit = self._told.seconds if self._told else self._timeout.total_seconds()
        if now - self._next > limit / PART:
            # This process itself was held up, and with it perhaps everybody else.
            self._since, self._next = now, now + limit
            return []
        return [self._look(now, 0.0, None)]

    def looked(
        self, node_rank: int, number: int, seen: Sequence[Observation], now: float
    ) -> list[Outcome]:
        """An agent says what it sees."""
        if self._looking is None or self._looking.look.number != number:
            return []
        self._looking.answers[node_rank] = tuple(seen)
        return self._conclude(now) if len(self._looking.answers) == self._num_nodes else []

    def _look(self, now: float, ping_seconds: float, about: frozenset[int] | None) -> Look:
        self._number += 1
        look = Look(self._number, ping_seconds)
        patience = ping_seconds or self._timeout.total_seconds() / PART**2
        self._looking = _Looking(look, now + 2 * patience, about)
        return look

    def _conclude(self, now: float) -> list[Outcome]:
        assert self._looking is not None
        done, self._looking = self._looking, None
        seen = tuple(each for answer in done.answers.values() for each in answer)
        if done.about is not None:
            return [Inquired(_culprits(seen, done.about), seen)]
        return self._consider(seen, done, now)

    def _consider(self, seen: tuple[Observation, ...], done: _Looking, now: float) -> list[Outcome]:
        learned = limit_of(seen, self._factor, self._timeout, self._steady >= self._ranks)
        limit = here(learned, seen, self._timeout)
        out: list[Outcome] = []
        if learned.step is not None and learned.differs_much(self._told):
            out.append(Learned(learned))
            self._told = learned
        silent = min((each.seconds for each in seen), default=0.0)
        silent = min(silent, now - self._since)
        left = limit.seconds - silent
        # What the ranks are in that takes longer than iterations do may end at any time.
        self._next = now + min(left, learned.seconds)
        if left > FINEST:
            return out
        deaf = tuple(sorted(set(range(self._num_nodes)) - done.answers.keys()))
        verdict = judge(seen, silent) if seen else None
        if verdict is None or not trains(seen) or (deaf and not verdict.told):
            self._next = now + limit.seconds
            return [*out, Deaf(deaf)] if deaf else out
        if not done.look.ping_seconds:
            return [*out, self._look(now, limit.seconds / PART, None)]
        self._next = now + limit.seconds
        killed = frozenset((each.global_rank, each.pid) for each in verdict.culprits)
        if killed & self._killed:
            return [*out, Stubborn(verdict.culprits)]
        self._killed = killed
        return [*out, Alarm(verdict, limit, seen)]


def _culprits(seen: tuple[Observation, ...], about: frozenset[int]) -> tuple[Observation, ...]:
    """Of these ranks those that hang, or all of them where that cannot be told."""
    asked = tuple(each for each in seen if each.global_rank in about)
    if not asked:
        return ()
    verdict = judge(asked, min(each.seconds for each in asked))
    return verdict.culprits if verdict.told else asked
