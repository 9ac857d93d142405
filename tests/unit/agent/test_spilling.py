"""One spill at a time, the same window everywhere, and nobody keeps a window for ever."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.agent.spilling import Order, Release, Report, Settle, Spill, Spilling
from megatron_moetion.vault.spill import Span

RANKS = (0, 1, 2)


def window(iteration: int) -> Span:
    return Span(iteration - 3, iteration)


def offer(leader: Spilling, iteration: int, *ranks: int, kept: bool = True) -> list[Order]:
    return [o for rank in ranks for o in leader.offered(rank, window(iteration), kept)]


def finish(leader: Spilling, iteration: int, *errors: str) -> list[Order]:
    return [o for n, e in enumerate(errors) for o in leader.written(n, window(iteration), e)]


def test_a_window_is_spilled_once_every_rank_keeps_it() -> None:
    leader = Spilling(RANKS, 2)
    assert offer(leader, 4, 0, 2) == []
    assert offer(leader, 4, 1) == [Spill(window(4))]


def test_it_is_valid_only_when_every_node_has_written_its_part() -> None:
    leader = Spilling(RANKS, 2)
    offer(leader, 4, *RANKS)
    assert finish(leader, 4, "") == []
    report, *orders = leader.written(1, window(4), "")
    assert report == Report("spilled", 4, "")
    assert orders == [Settle(window(4), valid=True), Release(window(4))]
    assert leader.valid == 4


def test_a_part_that_fails_fails_the_spill_and_is_said_once_until_one_succeeds() -> None:
    leader = Spilling(RANKS, 2)
    warned = []
    for iteration, error in ((4, "disk full"), (8, "disk full"), (12, ""), (16, "disk full")):
        offer(leader, iteration, *RANKS)
        report, settle, release = finish(leader, iteration, "", error)
        assert settle == Settle(window(iteration), valid=not error)
        assert release == Release(window(iteration))
        assert isinstance(report, Report)
        warned.append(report.warning)
        if error:
            assert (report.kind, report.detail) == ("spill-failed", "node 1: disk full")
    assert warned == [True, False, False, True]
    assert leader.valid == 12


def test_what_is_under_way_when_a_node_is_lost_is_given_up_and_the_next_one_is_written() -> None:
    leader = Spilling(RANKS, 2)
    offer(leader, 4, *RANKS)
    offer(leader, 8, 0)
    release, report, settle, done = leader.lost()
    assert release == Release(window(8))
    assert isinstance(report, Report)
    assert (report.kind, report.iteration, report.detail) == ("spill-failed", 4, "a node is lost")
    assert (settle, done) == (Settle(window(4), valid=False), Release(window(4)))
    # What its agent had written comes too late.
    assert finish(leader, 4, "", "") == []
    assert offer(leader, 8, 1) == [Release(window(8))]
    assert offer(leader, 12, *RANKS) == [Spill(window(12))]
    assert leader.lost()[0].iteration == 12  # type: ignore[union-attr]


def test_the_spill_that_the_job_started_from_is_none_that_it_made() -> None:
    assert Spilling(RANKS, 1, spilled=8).valid is None


def test_a_window_is_skipped_and_said_once_while_an_earlier_one_is_written() -> None:
    leader = Spilling(RANKS, 1)
    offer(leader, 4, *RANKS)
    assert [type(o) for o in offer(leader, 8, *RANKS, kept=False)] == [Report]
    assert [type(o) for o in finish(leader, 4, "")] == [Report, Settle, Release]
    assert offer(leader, 12, *RANKS) == [Spill(window(12))]


def test_a_window_that_only_some_keep_is_released_when_the_next_one_comes() -> None:
    leader = Spilling(RANKS, 1)
    offer(leader, 4, 0, 1)
    assert offer(leader, 8, 2) == [Release(window(4))]
    assert offer(leader, 4, 2) == [Release(window(4))]
    assert offer(leader, 8, 0, 1) == [Spill(window(8))]


def test_what_a_replacement_says_again_is_released_unless_it_is_being_written() -> None:
    leader = Spilling(RANKS, 1)
    offer(leader, 4, *RANKS)
    assert offer(leader, 4, 1) == []
    finish(leader, 4, "")
    assert offer(leader, 4, 1) == [Release(window(4))]


def test_after_a_cold_start_the_spill_that_it_started_from_is_not_written_again() -> None:
    leader = Spilling(RANKS, 1, spilled=8)
    assert offer(leader, 8, 0) == [Release(window(8))]
    assert offer(leader, 12, *RANKS) == [Spill(window(12))]


def test_offers_that_were_complete_while_another_was_written_start_after_it() -> None:
    leader = Spilling(RANKS, 1)
    offer(leader, 4, *RANKS)
    assert offer(leader, 8, *RANKS) == []
    assert finish(leader, 4, "")[-1] == Spill(window(8))


class Rank:
    """What a worker does: keeps one window, offers each, lets go when it is told."""

    def __init__(self) -> None:
        self.kept: Span | None = None
        self.next = 4


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.integers(0, 4), max_size=80))
def test_in_any_order_of_things_every_window_is_released_and_spills_go_on(
    steps: list[int],
) -> None:
    """Steps 0 to 2: a rank reaches its next window. 3: the node has written. 4: notices arrive."""
    leader, ranks = Spilling(RANKS, 1), [Rank() for _ in RANKS]
    writing: list[Span] = []
    under_way: list[tuple[int, Span]] = []

    def obey(orders: list[Order]) -> None:
        for order in orders:
            if isinstance(order, Spill):
                assert not writing, "two at a time"
                assert all(rank.kept == order.span for rank in ranks), "not everybody kept it"
                writing.append(order.span)
            elif isinstance(order, Release):
                under_way.extend((r, order.span) for r in RANKS)

    def move(step: int) -> None:
        if step < len(ranks):
            rank = ranks[step]
            if rank.next > min(r.next for r in ranks):
                return  # training keeps the ranks in step
            span, rank.next = window(rank.next), rank.next + 4
            kept = rank.kept is None
            rank.kept = span if kept else rank.kept
            obey(leader.offered(step, span, kept))
        elif step == 3 and writing:
            obey(leader.written(0, writing.pop(), ""))
        elif step == 4 and under_way:
            who, span = under_way.pop(0)
            if ranks[who].kept == span:
                ranks[who].kept = None

    for step in steps:
        move(step)
    spilled = 0
    for _ in range(4):  # however it began, windows are spilled again after a few more
        for step in (*RANKS, *[4] * 40):
            move(step)
        spilled += bool(writing)
        for step in (3, *[4] * 40):
            move(step)
    assert spilled >= 1
    assert not writing
