"""How long a window must be for capture to keep up with training, and which policy replays less.

Pure, but for `Pace`, which remembers measurements. Each rank works out its own fits; `choose` is
given those of all ranks, so that all come to the same choice.

Two limits, the slower decides. The copy engine has one iteration for each frame, so the largest
frame must fit. Replication may lag behind within its bound, so only the mean over a window counts
there.

Source: paper section 3.5 (the smallest window that causes no stall), which prices the first frame
alone and knows neither replication nor parts; design section 5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from statistics import median

from megatron_moetion.operators import Operator
from megatron_moetion.schedule import Schedule, Unit, WindowPolicy, generate
from megatron_moetion.vault.budget import frame_bytes, mib

DRIFT = 0.1
"""The window is decided again when iterations take this part longer or shorter (paper)."""
HISTORY = 50
"""Iterations in the sliding window of measurements."""
ENOUGH = 10
"""Iterations to be measured before anything is chosen: the first ones are slow."""
WINDOWS = range(1, 65)
FINENESS = 4
"""Parts are at most this part of a fair share: a frame exceeds the share by no more than one."""


@dataclass(frozen=True)
class Rates:
    """What one rank has measured.

    Attributes:
        iteration_seconds: median duration of an iteration.
        copy_bytes_per_second: from the device to host memory.
        replication_bytes_per_second: of this rank's frames to all their copies; infinite where none
            are made.
    """

    iteration_seconds: float
    copy_bytes_per_second: float
    replication_bytes_per_second: float = inf

    @property
    def copy_bytes(self) -> float:
        """What can be copied in one iteration."""
        return self.copy_bytes_per_second * self.iteration_seconds

    @property
    def replication_bytes(self) -> float:
        """What can be replicated in one iteration."""
        return self.replication_bytes_per_second * self.iteration_seconds

    def drifted(self, now: Rates) -> bool:
        """Whether iterations take so much longer or shorter now that the choice is made again."""
        return abs(now.iteration_seconds - self.iteration_seconds) >= DRIFT * self.iteration_seconds


class Pace:
    """Medians over the newest measurements.

    Args:
        size: how many of each kind count.
    """

    def __init__(self, size: int = HISTORY) -> None:
        self._seconds: deque[float] = deque(maxlen=size)
        self._copies: deque[float] = deque(maxlen=size)
        self._replications: deque[float] = deque(maxlen=size)

    def iterated(self, seconds: float) -> None:
        """An iteration of training has been timed."""
        self._seconds.append(seconds)

    def copied(self, nbytes: int, seconds: float) -> None:
        """The copy of a frame to host memory has been timed."""
        self._copies.append(nbytes / seconds)

    def replicated(self, nbytes: int, seconds: float) -> None:
        """A frame has been acknowledged by all its copies."""
        self._replications.append(nbytes / seconds)

    def rates(self) -> Rates | None:
        """The medians; None before `ENOUGH` iterations and a copy have been timed."""
        if len(self._seconds) < ENOUGH or not self._copies:
            return None
        replication = median(self._replications) if self._replications else inf
        return Rates(median(self._seconds), median(self._copies), replication)


@dataclass(frozen=True)
class Price:
    """Bytes per iteration of one rank's frames.

    Attributes:
        largest: of the largest frame of a window.
        total: of all frames of a window.
        window: how many those are.
    """

    largest: int
    total: int
    window: int

    @property
    def mean(self) -> float:
        return self.total / self.window


def price(schedule: Schedule, operators: Mapping[str, Operator], buffer_bytes: int = 0) -> Price:
    """Prices every frame of a window as the vault will.

    Args:
        operators: of this rank, by name.
        buffer_bytes: all model buffers, part of every frame.
    """
    plans = (schedule.frame_of_slot(slot) for slot in range(schedule.window))
    sizes = [frame_bytes(plan, operators, buffer_bytes) for plan in plans]
    return Price(max(sizes), sum(sizes), schedule.window)


@dataclass(frozen=True)
class Replay:
    """Iterations that a failed stage replays, over all iterations it can fail in.

    Without lag: every frame up to the failure is sealed.
    """

    mean: Fraction
    worst: int


def predicted_replay(policy: WindowPolicy, window: int) -> Replay:
    """What a schedule without empty slots comes to.

    Rolling: the newest W frames are always a base. Tumbling: only whole windows are, so what has
    been captured of the present one is replayed too.
    """
    between = window - 1
    if policy is WindowPolicy.ROLLING:
        return Replay(Fraction(between), between)
    return Replay(Fraction(3 * between, 2), 2 * between)


@dataclass(frozen=True)
class Fit:
    """The smallest window of one policy that one rank keeps up with.

    Attributes:
        split: as `schedule.generate` takes it; 0 when whole operators fit.
        price: of this rank's frames with them.
        rates: what this rank measured.
    """

    policy: WindowPolicy
    window: int
    split: int
    price: Price
    rates: Rates

    @property
    def overrun(self) -> float:
        """By how much the slower of the two limits is exceeded; at most 1 means that it fits."""
        return max(self._copy, self._replication)

    @property
    def _copy(self) -> float:
        return self.price.largest / self.rates.copy_bytes

    @property
    def _replication(self) -> float:
        return self.price.mean / self.rates.replication_bytes

    @property
    def limit(self) -> str:
        """The slower of the two limits, in numbers."""
        iteration = f"in an iteration of {1000 * self.rates.iteration_seconds:.0f} ms"
        if self._copy >= self._replication:
            return (
                f"{iteration} {mib(self.rates.copy_bytes)} can be copied to host memory, "
                f"the largest frame has {mib(self.price.largest)}"
            )
        return (
            f"{iteration} {mib(self.rates.replication_bytes)} can be replicated, "
            f"a frame has {mib(self.price.mean)} on average"
        )

    @property
    def consequence(self) -> str:
        """What becomes of a limit that is exceeded."""
        if self._copy >= self._replication:
            waits = 1000 * (self._copy - 1) * self.rates.iteration_seconds
            return f"training waits about {waits:.0f} ms in each iteration"
        return f"about one frame in {self._replication:.1f} is replicated"

    def to_row(self) -> list[float]:
        """As float64 numbers, `ROW` of them, so that ranks can exchange it in a collective."""
        price, rates = self.price, self.rates
        return [
            list(WindowPolicy).index(self.policy),
            self.window,
            self.split,
            price.largest,
            price.total,
            rates.iteration_seconds,
            rates.copy_bytes_per_second,
            rates.replication_bytes_per_second,
        ]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> Fit:
        """Whole numbers below 2**53 come back exactly."""
        policy, window, split, largest, total = (int(value) for value in row[:5])
        price = Price(largest, total, window)
        return cls(list(WindowPolicy)[policy], window, split, price, Rates(*row[5:]))


ROW = 8
"""Numbers in a row of a `Fit`."""


def fit(
    units: Sequence[Unit],
    operators: Mapping[str, Operator],
    rates: Rates,
    policy: WindowPolicy,
    buffer_bytes: int = 0,
    windows: Iterable[int] = WINDOWS,
    split: int | None = None,
) -> Fit:
    """The smallest window whose frames fit both limits, or the one that exceeds them least.

    A window is tried with whole operators first, then with parts, before a longer one is: every
    iteration of a window is replayed, while a part costs next to nothing.

    Args:
        units: in capture order.
        operators: of this rank, by name.
        windows: what may be taken, ascending; those that host memory has room for.
        split: as `schedule.generate` takes it, where the user has said so.
    """
    tried = []
    for window in windows:
        for parts in (0, FINENESS * window) if split is None else (split,):
            schedule = generate(units, window, policy, parts)
            if parts and split is None and not schedule.split:
                continue
            found = Fit(policy, window, parts, price(schedule, operators, buffer_bytes), rates)
            if found.overrun <= 1:
                return found
            tried.append(found)
    return min(tried, key=lambda found: found.overrun)


@dataclass(frozen=True)
class Choice:
    """What all ranks capture by.

    Attributes:
        fits: whether every rank keeps up with it.
        reason: one sentence with the numbers that decided.
    """

    policy: WindowPolicy
    window: int
    split: int
    fits: bool
    reason: str

    def news(self, before: Choice | None) -> str | None:
        """What to tell the user, once for each change; None when nothing has changed."""
        known = before and (before.policy, before.window, before.split, before.fits)
        return None if known == (self.policy, self.window, self.split, self.fits) else self.reason


def choose(fits: Sequence[Fit], split: int | None = None) -> Choice:
    """The policy that replays less, with the longest window that any rank needs.

    A rank that could do with a shorter one has smaller frames in the longer one. One rank that
    keeps up with no window of a policy speaks for all.

    Args:
        fits: of all ranks, for one policy or for both; in any order.
        split: as given to `fit`.
    """
    needs = []
    for policy in WindowPolicy:
        of_policy = [fit for fit in fits if fit.policy is policy]
        if of_policy:
            window, any_split = max(f.window for f in of_policy), any(f.split for f in of_policy)
            parts = FINENESS * window * any_split if split is None else split
            slowest = max(of_policy, key=lambda f: (f.overrun > 1, f.window, f.overrun))
            needs.append(_Need(slowest, policy, window, parts))
    best, *others = sorted(needs, key=lambda need: need.badness)
    against = "".join(f", {other.instead}" for other in others)
    reason = f"{best.words}{against}" if best.fits else best.words
    return Choice(best.policy, best.window, best.split, best.fits, reason)


@dataclass(frozen=True)
class _Need:
    """What all ranks need under one policy; `slowest` is the fit of the rank that decides."""

    slowest: Fit
    policy: WindowPolicy
    window: int
    split: int

    @property
    def fits(self) -> bool:
        return self.slowest.overrun <= 1

    @property
    def replay(self) -> Replay:
        return predicted_replay(self.policy, self.window)

    @property
    def badness(self) -> tuple[float, Fraction, int]:
        return (max(self.slowest.overrun, 1.0), self.replay.mean, self.replay.worst)

    @property
    def words(self) -> str:
        parts = f" with parts of at most 1/{self.split} of a rank's parameters" * bool(self.split)
        taken = f"{self.policy} windows of {self.window}{parts}"
        if not self.fits:
            return (
                f"no window lets capture keep up, {taken} come closest: {self.slowest.limit}; "
                f"{self.slowest.consequence}"
            )
        replayed = f"{float(self.replay.mean):g} iterations on average"
        return f"{taken}: {self.slowest.limit}; a rebuild covers {replayed}"

    @property
    def instead(self) -> str:
        if not self.fits:
            return f"{self.policy} ones would not keep up"
        return f"{float(self.replay.mean):g} with {self.policy} ones of {self.window}"
