"""What was rejected is new, the same, or there again."""

from __future__ import annotations

from megatron_moetion.agent.doubts import Doubts
from megatron_moetion.agent.escalation import Tier


def test_peers_that_meet_the_same_are_no_second_time() -> None:
    doubts = Doubts()
    assert not doubts.any
    assert doubts.raised(5) is Tier.LOCALIZED
    assert doubts.any
    assert doubts.raised(5) is None
    # Nobody has read anything yet, however many rounds have begun.
    assert doubts.raised(6) is None


def test_where_it_comes_again_behind_frames_that_were_looked_through_the_next_tier_is_tried() -> (
    None
):
    doubts = Doubts()
    tiers = []
    for iteration in (5, 5, 4, 5):
        tiers.append(doubts.raised(iteration))
        assert doubts.raised(iteration) is None
        doubts.looks_through()
    assert tiers == [*Tier]


def test_what_was_rejected_before_a_start_anew_has_the_first_frames_looked_through() -> None:
    doubts = Doubts(before=True)
    assert doubts.any
    doubts.looks_through()
    assert doubts.raised(5) is Tier.LOCALIZED


def test_further_on_it_is_something_new() -> None:
    doubts = Doubts()
    doubts.looks_through()
    assert not doubts.any
    for iteration in (5, 9):
        assert doubts.raised(iteration) is Tier.LOCALIZED
        doubts.looks_through()
    assert doubts.raised(9) is Tier.MEMORY


def test_only_the_process_that_said_so_left_with_it() -> None:
    doubts = Doubts()
    doubts.told(2, False)
    doubts.told(3, True)
    assert not doubts.rejected_by(2)
    assert [doubts.rejected_by(3), doubts.rejected_by(3)] == [True, False]
