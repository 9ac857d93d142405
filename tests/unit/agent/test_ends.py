"""Every end that is not survived: one line with what failed, which tiers were tried and what to do,
and a code that is not 0. That no end is missing here is read from the source.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from test_leader import ended
from test_round import NODES, WORLD, die, drive, ends, failed, feed_all, in_phase, reject, say

from megatron_moetion.agent import round as rounds
from megatron_moetion.agent.decision import AgentLost, End, Exited, Expired
from megatron_moetion.agent.escalation import Tier, Tried
from megatron_moetion.agent.round import Round
from megatron_moetion.config import RestartBudget
from megatron_moetion.recovery.phase import Phase

SECONDS = timedelta(seconds=30)


def before_protection() -> list[Any]:
    return Round(NODES).feed(Exited(2, 2, None))


def after_the_end() -> list[Any]:
    leader = Round(NODES)
    leader.feed(say(0, "finished"))
    return leader.feed(die(3, code=0))


def too_often() -> list[Any]:
    return Round(NODES, max_retries=0).feed(die(3))


def raises_too_often() -> list[Any]:
    leader = Round(NODES, max_retries=0)
    leader.feed(failed(3, "ValueError: a"))
    return leader.feed(die(3, code=1))


def hangs_too_often() -> list[Any]:
    leader = Round(NODES, max_retries=1)
    leader.feed(die(3))
    leader.feed(Expired(1, Phase.PLANNING, SECONDS, (1,)))
    leader.feed(die(1))
    drive(leader, {1, 3}, Phase.RESTORING)
    leader.feed(Expired(leader.epoch, Phase.RESTORING, SECONDS, (1,)))
    return leader.feed(die(1))


def over_budget() -> list[Any]:
    leader = Round(NODES, budget=RestartBudget(1, 60.0))
    for iteration in range(3):
        leader.feed(replace(die(3, iteration), at=float(iteration)))
        # Past the budget all start anew.
        feed_all(leader, [die(rank) for rank in WORLD[:3]] if iteration == 1 else [])
        drive(leader, set(WORLD) if iteration == 1 else {3}, Phase.TRAINING)
    return leader.feed(replace(die(3, 3), at=3.0))


def no_tier_left() -> list[Any]:
    tried = Tried((), ((Tier.CHECKPOINT, 0.0),))
    leader = Round(NODES, budget=RestartBudget(1, 60.0), tried=tried)
    leader.feed(replace(die(3), at=1.0))
    drive(leader, {3}, Phase.TRAINING)
    return leader.feed(replace(die(3, 6), at=2.0))


def rejected() -> list[Any]:
    leader = Round(NODES)
    leader.feed(die(3))
    drive(leader, {3}, Phase.RESTORING)
    feed_all(leader, [say(r, "joined", epoch=1, rebuilt=r == 3) for r in WORLD])
    reject(leader, 3)
    drive(leader, {3}, Phase.TRAINING)
    reject(leader, 3)
    feed_all(leader, [die(rank) for rank in WORLD[:3]])
    drive(leader, set(WORLD), Phase.TRAINING)
    return reject(leader, 3)


def node_without_copies() -> list[Any]:
    return Round(NODES).feed(AgentLost(1, "reset"))


def node_after_the_end() -> list[Any]:
    leader = Round(NODES, replaces_nodes=True)
    leader.feed(say(0, "finished"))
    return leader.feed(AgentLost(1, "reset"))


def node_that_nobody_replaces() -> list[Any]:
    leader = Round(NODES, replaces_nodes=True)
    leader.feed(AgentLost(1, "reset"))
    for op in ("report", "settled", "quiesced"):
        position = {"iteration": 5, "committed": 5}
        feed_all(leader, [say(r, op, epoch=1, position=position) for r in (0, 1)])
    return leader.feed(Expired(1, Phase.REGROUPING, SECONDS))


def damaged_log() -> list[Any]:
    leader = in_phase(Phase.RESTORING)
    said = {"global_rank": 0, "key": "boundary/9/0", "reason": "bits differ"}
    return leader.feed(say(3, "damaged", epoch=1, **said))


def nothing_to_rebuild_from() -> list[Any]:
    leader = in_phase(Phase.RESTORING)
    return leader.feed(say(3, "hopeless", reason="no frames", state_lost=True))


def unknown_message() -> list[Any]:
    return Round(NODES).feed(say(0, "gossip"))


def broken_device() -> list[Any]:
    leader = in_phase(Phase.REGROUPING)
    return leader.feed(say(3, "unfit", reason="device cuda:1 is broken"))


def silent_agent() -> list[Any]:
    return in_phase(Phase.GATHERING).feed(Expired(1, Phase.GATHERING, SECONDS))


ENDS: dict[Callable[[], list[Any]], tuple[str, str]] = {
    before_protection: ("rank 2 ended with code 2 before its first frame was sealed", "no tier"),
    after_the_end: ("rank 3 ended with code 0 after ranks [0] had finished", "no tier"),
    too_often: ("rank 3 failed 1 times at iteration 5 (--moetion-max-retries 0)", "no tier"),
    raises_too_often: (
        "rank 3 failed 1 times at iteration 5 (--moetion-max-retries 0): ValueError: a",
        "no tier",
    ),
    hangs_too_often: (
        "ranks [0, 1, 2, 3] did not answer within 30 s in phase RESTORING (waiting for the failed"
        " stage to load and replay, the others to join); raise --moetion-timeout if they were only"
        " slow; that was retry 1",
        "1 localized recovery",
    ),
    over_budget: (
        "more than 1 recoveries within 60 s (--moetion-restart-budget 1/60)",
        "2 localized recoveries, memory restart",
    ),
    no_tier_left: (
        "more than 1 recoveries within 60 s (--moetion-restart-budget 1/60)",
        "1 localized recovery, Megatron checkpoint",
    ),
    rejected: (
        "what was rebuilt from memory gives results that the host rejects: NaN",
        "2 localized recoveries, memory restart",
    ),
    node_without_copies: ("the agent of node 1 is gone (reset)", "no tier"),
    node_after_the_end: ("the agent of node 1 is gone after ranks [0] had finished", "no tier"),
    node_that_nobody_replaces: (
        "no node took the place of nodes [1] within 30 s; raise --moetion-timeout if it takes"
        " longer to start one",
        "1 localized recovery",
    ),
    damaged_log: ("bits differ; there is no other copy of it", "1 localized recovery"),
    nothing_to_rebuild_from: ("no frames", "1 localized recovery"),
    unknown_message: ("rank 0 sent an unknown message 'gossip'", "no tier"),
    broken_device: (
        "rank 3 of node 1: device cuda:1 is broken, and no other node can take its place",
        "1 localized recovery",
    ),
    silent_agent: (
        "nodes [0, 1] did not answer within 30 s in phase GATHERING (waiting for the inventories of"
        " all vaults); raise --moetion-timeout if they were only slow",
        "1 localized recovery",
    ),
}


@pytest.mark.parametrize("how", ENDS, ids=lambda how: how.__name__)
def test_each_says_in_one_line_what_failed_which_tiers_were_tried_and_what_to_do(
    how: Callable[[], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (end,) = ends(how())
    reason, tried = ENDS[how]
    for spilled, to_do in (
        (False, "restart from a Megatron checkpoint with --load, or afresh"),
        (True, "the same command goes on from the spill of iteration 6"),
    ):
        # As to a spill, what else there is to do is another test's business.
        orders = ended(replace(end, state_lost=False), spilled=spilled)
        assert all(order["code"] != 0 for _, order in orders)
        *before, line = capsys.readouterr().err.splitlines()
        assert line == f"moetion-run: ending the job: {reason}; tried: {tried}; {to_do}"
        assert all(re.match(r"\[rank\d\]: |moetion-run: what rank \d raised", x) for x in before)


def test_no_end_of_the_round_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse(inspect.getsource(rounds))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    places = {
        (call.lineno, call.end_lineno or call.lineno)
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "_hopeless"
    }
    reached: set[int] = set()
    hopeless = Round._hopeless

    def noted(self: Round, *args: Any, **options: Any) -> list[Any]:
        reached.add(sys._getframe(1).f_lineno)
        return hopeless(self, *args, **options)

    monkeypatch.setattr(Round, "_hopeless", noted)
    for how in ENDS:
        assert isinstance(ends(how())[0], End)
    missing = {place for place in places if not any(place[0] <= n <= place[1] for n in reached)}
    assert not missing, f"round.py ends the job in lines {sorted(missing)} too"
