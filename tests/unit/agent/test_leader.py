"""What the leader tells all nodes, and the user, when the job ends or starts anew."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from megatron_moetion.agent.decision import Command, End, Event
from megatron_moetion.agent.escalation import Tier, Tried
from megatron_moetion.agent.fallback import Begun, FallBack, Limit, Source, Stored
from megatron_moetion.agent.leader import Leader
from megatron_moetion.agent.membership import Member, Members
from megatron_moetion.events import EventLog
from megatron_moetion.recovery.phase import Phase

MEMBERS = Members((Member(0, "a", 1, 1, 0), Member(1, "b", 1, 1, 1)), 0)


class Ending:
    """A decider that ends the job at the first event."""

    epoch = 0
    phase = Phase.TRAINING

    def __init__(self, end: End) -> None:
        self._end = end

    def feed(self, event: Event) -> list[Command]:
        return [self._end]


def ended(end: End, *, spilled: bool, **options: Any) -> list[tuple[int, dict[str, Any]]]:
    """The orders with which a job ends that had made a spill of iteration 6, or none."""
    orders: list[tuple[int, dict[str, Any]]] = []
    send = lambda node, order: orders.append((node, order))  # noqa: E731
    leader = Leader(MEMBERS, Ending(end), send, EventLog(None, "x"), timedelta(1), **options)
    span = {"base": 4, "iteration": 6}
    for node in (0, 1) if spilled else ():
        offer = {"op": "window", "span": span, "kept": True}
        leader.take(node, {"op": "said", "global_rank": node, "message": offer})
    for node in (0, 1) if spilled else ():
        leader.take(node, {"op": "spilled", "span": span, "error": ""})
    del orders[:]
    leader.take(1, {"op": "exited", "global_rank": 1, "code": 9, "position": None})
    leader.take(0, {"op": "exited", "global_rank": 0, "code": 9, "position": None})
    return orders


def test_lost_state_starts_anew_from_the_spill_everywhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    orders = ended(End("no frames", 9, True, (1,), tried=Tried((1.0,))), spilled=True)
    # Once, and the leader's own node last.
    assert [node for node, _ in orders] == [1, 0]
    assert orders[0][1] == orders[1][1]
    order = orders[0][1]
    assert (order["op"], order["reason"], order["code"]) == ("end", "no frames", 9)
    fall_back = FallBack.from_json(order["fall_back"])
    assert fall_back.limit == Limit(Source(6, True), Source(6, True))
    assert fall_back.fired == (1,)
    assert str(fall_back.tried) == "1 localized recovery, spill"
    anew = "moetion-run: no frames; all workers start anew from the spill of iteration 6\n"
    assert capsys.readouterr().err == anew


def test_or_from_the_checkpoint_that_is_there_by_then_and_says_what_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun, tried = Begun(Source(6, True), Source(6, True)), Tried((1.0,), ((Tier.SPILL, 2.0),))
    stored = lambda: Stored((6, 3), 5)  # noqa: E731
    end = End("no frames", 9, True, tried=tried, committed=8)
    orders = ended(end, spilled=False, begun=begun, stored=stored)
    told = [FallBack.from_json(order["fall_back"]) for _, order in orders]
    assert [each.limit for each in told] == [Limit(Source(5, False), Source(6, True))] * 2
    assert str(told[0].tried) == "1 localized recovery, spill, Megatron checkpoint"
    assert capsys.readouterr().err == (
        "moetion-run: no frames; iterations 6 to 8 are run again; all workers start anew from the"
        " Megatron checkpoint of iteration 5\n"
    )
    # Nothing new is there behind that.
    begun = Begun(Source(6, True), Source(5, False))
    orders = ended(end, spilled=False, begun=begun, stored=stored)
    assert [(order["code"], order["fall_back"]) for _, order in orders] == [(9, None)] * 2
    assert capsys.readouterr().err == (
        "moetion-run: ending the job: no frames; tried: 1 localized recovery, spill; restart from a"
        " Megatron checkpoint with --load, or afresh\n"
    )


def test_an_older_spill_only_where_the_newest_is_not_to_be_trusted() -> None:
    begun, stored = Begun(Source(6, True), Source(6, True)), lambda: Stored((6, 3), None)
    for distrusted, expected in ((False, None), (True, Source(3, True))):
        end = End("NaN", 9, True, tried=Tried(), distrusted=distrusted)
        orders = ended(end, spilled=False, begun=begun, stored=stored)
        told = {
            order["fall_back"] and FallBack.from_json(order["fall_back"]) for _, order in orders
        }
        assert {fall_back and fall_back.limit.best for fall_back in told} == {expected}
        assert {fall_back.distrusted for fall_back in told if fall_back} <= {True}


def test_a_checkpoint_that_is_newer_is_what_the_same_command_goes_on_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended(End("it broke", 9, tried=Tried()), spilled=True, stored=lambda: Stored((6,), 7))
    line = capsys.readouterr().err
    assert line.endswith("; the same command goes on from the Megatron checkpoint of iteration 7\n")


@pytest.mark.parametrize(
    ("state_lost", "spilled", "can_begin_again", "hint"),
    [
        (True, False, True, "; restart from a Megatron checkpoint with --load, or afresh"),
        (True, True, False, "; the same command goes on from the spill of iteration 6"),
        (False, True, True, "; the same command goes on from the spill of iteration 6"),
        (False, False, True, "; restart from a Megatron checkpoint with --load, or afresh"),
    ],
)
def test_otherwise_one_line_says_what_to_do(
    state_lost: bool,
    spilled: bool,
    can_begin_again: bool,
    hint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    end = End("it broke", 9, state_lost, tried=Tried((1.0,)))
    orders = ended(end, spilled=spilled, can_begin_again=can_begin_again)
    assert [(order["code"], order["fall_back"]) for _, order in orders] == [(9, None)] * 2
    assert capsys.readouterr().err == (
        f"moetion-run: ending the job: it broke; tried: 1 localized recovery{hint}\n"
    )


def test_a_refusal_says_itself_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    ended(End("give more memory", 1), spilled=False)
    assert capsys.readouterr().err == "moetion-run: ending the job: give more memory\n"
