"""Which cut a job takes where the user leaves it open: decided once, before the first step. Pure.

Nothing has been trained then, so an iteration is taken for as short as its arithmetic lets it be at
the rate that the device was measured to multiply at. A cut that keeps up with such iterations keeps
up with real ones. What is compared is the time that a failure costs everybody:

- stage: W - 1 iterations are replayed;
- shard: one iteration is run again, as the update of the rank that died is not captured yet;

and under both W frames are loaded to begin with.

Source: design section 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_moetion.schedule import WindowPolicy
from megatron_moetion.vault.budget import mib
from megatron_moetion.window import Fit, predicted_replay

CutName = Literal["stage", "shard"]
CUTS: tuple[CutName, ...] = ("stage", "shard")


@dataclass(frozen=True)
class Offer:
    """What one cut comes to on one rank, or on the rank of a job on which it comes to most.

    Attributes:
        window: the smallest that capture keeps up with.
        frame_bytes: of the largest frame, logs included.
        overrun: by how much the slower of copying and replication is exceeded; at most 1 fits.
        downtime_seconds: what a failure costs everybody.
        host_bytes: of frames, logs and copies on the rank's node.
        free_bytes: of host memory there.
    """

    window: int
    frame_bytes: float
    overrun: float
    downtime_seconds: float
    host_bytes: float
    free_bytes: float

    @property
    def keeps_up(self) -> bool:
        return self.overrun <= 1

    @property
    def has_room(self) -> bool:
        return self.host_bytes <= self.free_bytes

    def to_row(self) -> list[float]:
        """As `ROW` float64 numbers, so that ranks can exchange it in a collective."""
        return [
            self.window,
            self.frame_bytes,
            self.overrun,
            self.downtime_seconds,
            self.host_bytes,
            self.free_bytes,
        ]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> Offer:
        """The inverse of `to_row`."""
        return cls(int(row[0]), *row[1:])


ROW = 6


def offer(cut: CutName, fit: Fit, host_bytes: float, free_bytes: float) -> Offer:
    """What a cut comes to on one rank.

    Args:
        fit: with rolling windows and the rates that were measured before the first step.
        host_bytes: on this rank's node.
        free_bytes: likewise.
    """
    replayed = predicted_replay(WindowPolicy.ROLLING, fit.window).worst if cut == "stage" else 1
    rates = fit.rates
    loading = fit.price.total / rates.copy_bytes_per_second
    downtime = replayed * rates.iteration_seconds + loading
    return Offer(fit.window, fit.price.largest, fit.overrun, downtime, host_bytes, free_bytes)


@dataclass(frozen=True)
class CutChoice:
    """The cut of a job.

    Attributes:
        reason: one sentence with the numbers that decided.
    """

    cut: CutName
    reason: str


def choose_cut(
    offers: Mapping[CutName, Sequence[Offer]], ruled_out: Mapping[CutName, str]
) -> CutChoice:
    """The cut that costs less after a failure, of those that fit host memory, copying and
    replication.

    Where neither keeps up for sure it is the one that exceeds its limit less; where neither has
    room it is the one that needs less, and what claims the memory refuses it.

    Args:
        offers: of all ranks, for each cut.
        ruled_out: why a cut is none for this model, for at most one of them.
    """
    worst = {cut: _worst(of_all) for cut, of_all in offers.items()}
    left = [cut for cut in CUTS if cut not in ruled_out]
    best, *others = sorted(left, key=lambda cut: _badness(cut, worst[cut]))
    words = _words(worst[best])
    if not others:
        (other,) = ruled_out
        return CutChoice(best, f"{words}; {other} is not possible: {ruled_out[other]}")
    return CutChoice(best, f"{words}; {others[0]}: {_words(worst[others[0]])}")


def _worst(offers: Sequence[Offer]) -> Offer:
    fullest = max(offers, key=lambda each: each.host_bytes - each.free_bytes)
    return Offer(
        window=max(each.window for each in offers),
        frame_bytes=max(each.frame_bytes for each in offers),
        overrun=max(each.overrun for each in offers),
        downtime_seconds=max(each.downtime_seconds for each in offers),
        host_bytes=fullest.host_bytes,
        free_bytes=fullest.free_bytes,
    )


def _badness(cut: CutName, offer: Offer) -> tuple[float, float, float, int]:
    shortage = 0 if offer.has_room else offer.host_bytes - offer.free_bytes
    # A tie goes to the one that healthy ranks notice less.
    return shortage, max(offer.overrun, 1.0), offer.downtime_seconds, CUTS.index(cut)


def _words(offer: Offer) -> str:
    kept = "" if offer.keeps_up else f", {offer.overrun:.1f} times what is sure to be copied"
    lacks = "" if offer.has_room else ", which are not there"
    return (
        f"a failure costs at least {1000 * offer.downtime_seconds:.3g} ms with windows of"
        f" {offer.window}, a frame and its logs have at most {mib(offer.frame_bytes)}{kept}, a"
        f" node needs {mib(offer.host_bytes)} of {mib(offer.free_bytes)} of host memory{lacks}"
    )
