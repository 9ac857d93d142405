"""Whether a job hangs, and who hangs first: pure decisions over what agents see of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from megatron_moetion.progress import EVALUATION, SAVING, SET_UP

SHORTEST_OF_TIMEOUT = 20
"""No limit is shorter than this part of --moetion-timeout: what holds a healthy rank up (a slow
file, a kernel that is compiled late) does not shrink with its iterations.
"""
OUTLIERS_OF_STEPS = 16
"""Of so many iterations the longest one says nothing."""
FEWEST_PAUSES = 2
"""Evaluations, or savings, from which on it is known how long a rank pauses in one; the first one
makes data sets and folders.
"""
MUCH = 2.0
"""A limit that has changed by this factor is told again."""
STOPPED, TRACED, UNINTERRUPTIBLE = "T", "t", "D"


@dataclass(frozen=True)
class Observation:
    """What an agent sees of a rank from outside.

    Attributes:
        global_rank: who.
        pid: of its process; 0 without one.
        seconds: since it was last seen to do something.
        iteration: that it is in.
        ordinal: how many places of the iteration it has been through.
        place: see `progress.PLACES`.
        waiting: for peers.
        state: of the process, the letter of /proc/PID/stat; empty without one.
        answers: whether it answered a ping in time; None if it was not asked.
        step: seconds that a usual iteration takes; None while that is not known.
        pause: in an evaluation or in saving, the longest time that this rank has been without
            progress in earlier ones; None while too few are known, and elsewhere.
    """

    global_rank: int
    pid: int
    seconds: float
    iteration: int
    ordinal: int
    place: str
    waiting: bool
    state: str
    answers: bool | None = None
    step: float | None = None
    pause: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def how(self) -> str:
        """What there is to say of it besides its place."""
        if self.state == STOPPED:
            return "stopped by a signal"
        if self.state == TRACED:
            return "stopped by a debugger"
        held = ["its listener does not answer: it holds the GIL"] if self.answers is False else []
        if self.state == UNINTERRUPTIBLE:
            held.append("in a system call that cannot be interrupted")
        if not self.state:
            return "without a process"
        return ", ".join([*held, "waits for peers" if self.waiting else "not waiting for peers"])

    @property
    def line(self) -> str:
        """A row of the table of all ranks."""
        where = f"in iteration {self.iteration} at {self.place}"
        return f"global rank {self.global_rank} {where}, {self.seconds:.1f} s ago ({self.how})"


@dataclass(frozen=True)
class Limit:
    """How long nobody may make progress.

    Attributes:
        seconds: so long.
        step: seconds of a usual iteration, or of what else `learned_from` says, that it was learned
            from; None before that.
        factor: of `step`.
        learned_from: what `step` is of.
    """

    seconds: float
    step: float | None
    factor: float
    learned_from: str = "iterations"

    def __str__(self) -> str:
        limit = f"limit {self.seconds:.3g} s"
        if self.step is None:
            return f"{limit}, --moetion-timeout, as nothing is learned here"
        times = f"{self.factor:g} {self.learned_from} of {self.step:.3g} s"
        if self.seconds > self.factor * self.step:
            return f"{limit}, a {SHORTEST_OF_TIMEOUT}th of --moetion-timeout, as {times} are less"
        return f"{limit}, learned from {times}"

    def differs_much(self, other: Limit | None) -> bool:
        """Whether it is worth a line after the other one was told."""
        if other is None or (self.step is None) != (other.step is None):
            return True
        low, high = sorted((self.seconds, other.seconds))
        return high >= MUCH * low


@dataclass(frozen=True)
class Verdict:
    """Who is to be replaced.

    Attributes:
        culprits: observations of those who hang.
        told: they can be told from the others; else the choice is only a deterministic one.
        seconds: how long nobody has made progress.
    """

    culprits: tuple[Observation, ...]
    told: bool
    seconds: float


def usual_step(steps: Sequence[float]) -> float | None:
    """How long a usual iteration takes at most: the longest time, but for one in OUTLIERS_OF_STEPS.

    Long ones that come again and again are usual; none is made of a single one.

    Args:
        steps: seconds of iterations, in any order.
    """
    if not steps:
        return None
    return sorted(steps)[-1 - len(steps) // OUTLIERS_OF_STEPS]


def limit_of(
    observations: Iterable[Observation], factor: float, timeout: timedelta, steady: bool
) -> Limit:
    """How long nobody may make progress.

    Args:
        factor: of --moetion-hang-factor.
        timeout: of --moetion-timeout.
        steady: every rank has seen some usual iterations since the start or the last recovery.
    """
    steps = [each.step for each in observations if each.step is not None]
    if not steady or not steps:
        return Limit(timeout.total_seconds(), None, factor)
    shortest = timeout.total_seconds() / SHORTEST_OF_TIMEOUT
    return Limit(max(factor * max(steps), shortest), max(steps), factor)


def here(limit: Limit, observations: Iterable[Observation], timeout: timedelta) -> Limit:
    """The limit where the ranks are: in an evaluation or in saving it is learned from earlier ones,
    and never longer than the timeout. One that a rank has not seen (with a recovery in it, whoever
    takes part for the first time) may take as long as that.
    """
    aside = [each for each in observations if each.place.partition(":")[0] in (EVALUATION, SAVING)]
    if not aside:
        return limit
    pauses = [each.pause for each in aside if each.pause is not None]
    longest = timeout.total_seconds()
    if len(pauses) == len(aside) and limit.step is not None:
        seconds = max(limit.factor * max(pauses), longest / SHORTEST_OF_TIMEOUT)
        if seconds < longest:
            return Limit(seconds, max(pauses), limit.factor, "pauses seen here")
    return Limit(longest, None, limit.factor)


def usual_pause(pauses: Sequence[float]) -> float | None:
    """How long a rank is without progress in an evaluation or in saving; None as long as there were
    too few.
    """
    return max(pauses) if len(pauses) >= FEWEST_PAUSES else None


def trains(observations: Iterable[Observation]) -> bool:
    """Whether all ranks have begun to train. Before that nothing is protected that could be
    replaced, and the host's own limits hold.
    """
    return all(each.place != SET_UP and each.pid for each in observations)


def judge(observations: Iterable[Observation], seconds: float) -> Verdict:
    """Who hangs when nobody makes progress.

    What tells more comes first: a stopped process; one that holds the GIL outside a wait for
    peers; who does not wait for peers while others do; who holds the GIL inside one. Else nobody
    can be told from the others, and it is who has come least far, of several the first.

    Args:
        observations: not empty.
        seconds: how long nobody has made progress.
    """
    ranks = sorted(observations, key=lambda each: each.global_rank)
    busy = [each for each in ranks if not each.waiting]
    for group in (
        [each for each in ranks if each.state in (STOPPED, TRACED)],
        [each for each in busy if each.answers is False],
        busy if len(busy) < len(ranks) else [],
        [each for each in ranks if each.answers is False],
    ):
        if group:
            return Verdict(tuple(group), True, seconds)
    least = min(ranks, key=lambda each: (each.iteration, each.ordinal, each.global_rank))
    return Verdict((least,), False, seconds)
