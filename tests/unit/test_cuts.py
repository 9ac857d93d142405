"""The cut that costs less, of those that fit."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.cuts import CUTS, ROW, CutName, Offer, choose_cut, offer
from megatron_moetion.schedule import WindowPolicy
from megatron_moetion.window import Fit, Price, Rates

GIB = 2.0**30
OFFERS = st.builds(
    Offer,
    window=st.integers(1, 16),
    frame_bytes=st.floats(0, 2**40),
    overrun=st.floats(0, 8),
    downtime_seconds=st.floats(0, 600),
    host_bytes=st.floats(0, 2**40),
    free_bytes=st.floats(0, 2**40),
)
RANKS = st.integers(1, 5).flatmap(
    lambda n: st.fixed_dictionaries({cut: st.lists(OFFERS, min_size=n, max_size=n) for cut in CUTS})
)
GOOD = Offer(4, GIB, 0.5, 1.0, GIB, 8 * GIB)


def fit(window: int, largest: int = 100, seconds: float = 1.0) -> Fit:
    price = Price(largest, largest * window, window)
    return Fit(WindowPolicy.ROLLING, window, 0, price, Rates(seconds, 1000.0))


def chosen(stage: Offer, shard: Offer) -> CutName:
    return choose_cut({"stage": [stage], "shard": [shard]}, {}).cut


def test_a_long_window_is_replayed_and_one_iteration_is_run_again() -> None:
    stage, shard = offer("stage", fit(4), GIB, GIB), offer("shard", fit(4), GIB, GIB)
    # Three iterations, or one, and four frames of a tenth of a second each.
    assert (stage.downtime_seconds, shard.downtime_seconds) == (3.4, 1.4)
    assert chosen(stage, shard) == "shard"
    # With windows of two it is one of either, and the healthy ranks of the stage cut need not run.
    assert chosen(offer("stage", fit(2), GIB, GIB), offer("shard", fit(2), GIB, GIB)) == "stage"
    # What has to be loaded counts, too.
    slow = offer("shard", fit(4, largest=600), GIB, GIB)
    assert chosen(stage, slow) == "stage"


def test_memory_comes_first_then_keeping_up() -> None:
    cheap = replace(GOOD, downtime_seconds=0.1)
    assert chosen(GOOD, cheap) == "shard"
    assert chosen(GOOD, replace(cheap, host_bytes=9 * GIB)) == "stage"
    assert chosen(GOOD, replace(cheap, overrun=1.01)) == "stage"
    # Where neither is sure, it is the one that exceeds less.
    assert chosen(replace(GOOD, overrun=3.0), replace(GOOD, overrun=2.0)) == "shard"
    assert chosen(replace(GOOD, host_bytes=9 * GIB), replace(GOOD, host_bytes=10 * GIB)) == "stage"


@given(RANKS)
def test_the_rank_that_is_worst_off_decides(offers: dict[CutName, list[Offer]]) -> None:
    choice = choose_cut(offers, {})
    room = {cut: all(each.has_room for each in offers[cut]) for cut in CUTS}
    keeps_up = {cut: all(each.keeps_up for each in offers[cut]) for cut in CUTS}
    other = CUTS[1 - CUTS.index(choice.cut)]
    assert room[choice.cut] or not room[other]
    if room[choice.cut] and room[other]:
        assert keeps_up[choice.cut] or not keeps_up[other]
    assert choose_cut({cut: offers[cut][::-1] for cut in CUTS}, {}).cut == choice.cut


@given(RANKS, st.sampled_from(CUTS))
def test_what_is_ruled_out_is_never_taken_and_the_reason_is_told(
    offers: dict[CutName, list[Offer]], out: CutName
) -> None:
    choice = choose_cut(offers, {out: "of a reason"})
    assert choice.cut != out
    assert choice.reason.endswith(f"{out} is not possible: of a reason")


@given(OFFERS)
def test_ranks_exchange_exactly_what_they_have(told: Offer) -> None:
    row = told.to_row()
    assert len(row) == ROW
    assert Offer.from_row(row) == told
