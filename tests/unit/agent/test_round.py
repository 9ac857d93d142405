"""The leader's decisions, event by event, and under failures in any order."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.agent.decision import (
    AgentJoined,
    AgentLost,
    Command,
    End,
    Event,
    Evict,
    Exited,
    Expel,
    Expired,
    Gather,
    Gathered,
    Notify,
    Record,
    Replace,
    Restored,
    Said,
)
from megatron_moetion.agent.escalation import NOTHING_TRIED, Tier, Tried
from megatron_moetion.agent.round import Round
from megatron_moetion.agent.traces import Trace
from megatron_moetion.config import Config, RestartBudget
from megatron_moetion.recovery.phase import FINAL, Phase

MAX_RETRIES = Config().max_retries
NODES = ((0, 1), (2, 3))
WORLD = (0, 1, 2, 3)


def at(iteration: int) -> dict[str, int]:
    return {"iteration": iteration, "committed": iteration}


def die(rank: int, iteration: int = 5, code: int = 137) -> Exited:
    return Exited(rank, code, at(iteration))


def say(rank: int, op: str, **fields: Any) -> Said:
    return Said(rank, {"op": op, **fields})


def notices(commands: list[Command], op: str) -> list[Notify]:
    return [c for c in commands if isinstance(c, Notify) and c.message["op"] == op]


def recorded(commands: list[Command]) -> list[str]:
    return [command.kind for command in commands if isinstance(command, Record)]


def ends(commands: list[Command]) -> list[End]:
    return [command for command in commands if isinstance(command, End)]


def feed_all(leader: Round, events: list[Event]) -> list[Command]:
    return [command for event in events for command in leader.feed(event)]


def gathered(leader: Round, node_rank: int) -> Gathered:
    ranks = NODES[node_rank]
    frames = {str(rank): [{"key": f"frame/5/{rank}"}] for rank in ranks}
    positions = {str(rank): at(5) for rank in ranks}
    return Gathered(node_rank, leader.epoch, frames, positions)


def drive(leader: Round, dead: set[int], until: Phase) -> list[Command]:
    """Let everybody answer in order until a phase is reached; returns the last commands."""
    alive = [rank for rank in WORLD if rank not in dead]
    commands: list[Command] = []
    while leader.phase is not until:
        epoch = leader.epoch
        match leader.phase:
            case Phase.PLANNING:
                answers: list[Event] = [
                    say(r, "report", epoch=epoch, position=at(5)) for r in alive
                ]
            case Phase.SETTLING:
                answers = [say(r, "settled", epoch=epoch) for r in alive]
            case Phase.REGROUPING:
                answers = [say(r, "ready", epoch=epoch) for r in dead]
                answers += [say(r, "quiesced", epoch=epoch) for r in alive]
            case Phase.GATHERING:
                answers = [gathered(leader, node_rank) for node_rank in range(2)]
            case Phase.RESTORING:
                answers = [say(r, "joined", epoch=epoch, details={}) for r in WORLD]
            case other:
                raise AssertionError(f"stuck in {other}")
        commands = feed_all(leader, answers)
    return commands


def in_phase(phase: Phase) -> Round:
    leader = Round(NODES)
    if phase is Phase.FINISHED:
        events: list[Event] = [say(rank, "finished") for rank in WORLD]
        feed_all(leader, events + [Exited(rank, 0, at(9)) for rank in WORLD])
    elif phase is Phase.FALLING_BACK:
        leader.feed(say(0, "hopeless", reason="no frames"))
    elif phase is not Phase.TRAINING:
        leader.feed(die(3))
        drive(leader, {3}, phase)
    assert leader.phase is phase
    return leader


def test_a_death_freezes_the_others_and_assigns_a_replacement_at_once() -> None:
    leader = Round(NODES)
    commands = leader.feed(die(3))
    assert notices(commands, "freeze") == [
        Notify((0, 1, 2), {"op": "freeze", "epoch": 1, "dead": [3]})
    ]
    assert Replace(3, 1, ()) in commands
    assert leader.phase is Phase.PLANNING


def test_the_furthest_survivor_decides_what_is_committed() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    leader.feed(say(0, "report", epoch=1, position=at(6)))
    leader.feed(say(1, "report", epoch=1, position=at(7)))
    commands = leader.feed(say(2, "report", epoch=1, position=at(6)))
    verdict = {"op": "verdict", "epoch": 1, "committed": 7}
    assert notices(commands, "verdict") == [Notify((0, 1, 2), verdict)]


def test_facts_hold_every_inventory_and_the_newest_positions() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    drive(leader, {3}, Phase.GATHERING)
    leader.feed(gathered(leader, 1))
    (facts,) = notices(leader.feed(gathered(leader, 0)), "facts")
    assert facts.global_ranks == WORLD
    assert facts.message["committed"] == 5
    assert facts.message["dead"] == [3]
    assert set(facts.message["frames"]) == set(facts.message["positions"]) == set("0123")


def test_everybody_resumes_once_all_have_joined() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    commands = drive(leader, {3}, Phase.TRAINING)
    assert notices(commands, "resume") == [Notify(WORLD, {"op": "resume", "epoch": 1})]
    assert recorded(commands) == ["resumed"]


def test_the_first_notice_of_a_whole_round_is_seen_in_order() -> None:
    leader = Round(NODES)
    order = [c.message["op"] for c in leader.feed(die(3)) if isinstance(c, Notify)]
    for phase in (Phase.SETTLING, Phase.REGROUPING, Phase.GATHERING, Phase.RESTORING):
        commands = drive(leader, {3}, phase)
        order += [c.message["op"] for c in commands if isinstance(c, Notify)]
        order += ["gather" for c in commands if isinstance(c, Gather)]
    order += [c.message["op"] for c in drive(leader, {3}, Phase.TRAINING) if isinstance(c, Notify)]
    assert order == ["freeze", "verdict", "abort", "gather", "facts", "resume"]


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in FINAL])
def test_a_second_death_in_any_phase_starts_the_round_again(phase: Phase) -> None:
    leader = in_phase(phase)
    before = leader.epoch
    commands = leader.feed(die(1))
    (freeze,) = notices(commands, "freeze")
    assert leader.phase is Phase.PLANNING
    assert leader.epoch == before + 1
    assert freeze.message["dead"] == ([1] if phase is Phase.TRAINING else [1, 3])
    drive(leader, {1} if phase is Phase.TRAINING else {1, 3}, Phase.TRAINING)


def test_a_replacement_that_is_ready_counts_in_the_next_round_and_hears_of_it() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    drive(leader, {3}, Phase.RESTORING)
    (freeze,) = notices(leader.feed(die(2)), "freeze")
    assert freeze.global_ranks == (0, 1, 3)
    drive(leader, {2, 3}, Phase.REGROUPING)
    assert leader.missing() == [0, 1, 2]


def test_a_replacement_that_still_boots_is_waited_for_and_not_started_again() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    commands = leader.feed(die(2))
    assert [c.global_rank for c in commands if isinstance(c, Replace)] == [2]
    drive_to_regroup = [say(r, "report", epoch=2, position=at(5)) for r in (0, 1)]
    feed_all(leader, drive_to_regroup + [say(r, "settled", epoch=2) for r in (0, 1)])
    feed_all(leader, [say(r, "quiesced", epoch=2) for r in (0, 1)])
    assert leader.missing() == [2, 3]
    # It read its epoch when it was started; by now there has been another failure.
    leader.feed(say(3, "ready", epoch=1))
    assert leader.missing() == [2]


@pytest.mark.parametrize("op", ["report", "settled", "quiesced", "joined"])
@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in FINAL])
def test_an_answer_to_an_older_epoch_changes_nothing(phase: Phase, op: str) -> None:
    leader = in_phase(phase)
    missing = leader.missing()
    assert leader.feed(say(0, op, epoch=leader.epoch - 1, position=at(99))) == []
    assert (leader.phase, leader.missing()) == (phase, missing)


EVENTS: dict[str, Event] = {
    "death": die(0),
    "unprotected death": Exited(0, 1, None),
    "report": say(0, "report", epoch=1, position=at(5)),
    "settled": say(0, "settled", epoch=1),
    "quiesced": say(0, "quiesced", epoch=1),
    "ready": say(3, "ready", epoch=1),
    "joined": say(0, "joined", epoch=1),
    "finished": say(0, "finished"),
    "fired": say(0, "fired", index=0),
    "hopeless": say(0, "hopeless", reason="no frames"),
    "unknown": say(0, "gossip"),
    "gathered": Gathered(0, 1, {}, {}),
    "stale gathered": Gathered(0, 0, {}, {}),
    "agent lost": AgentLost(1, "reset"),
    "stale expiry": Expired(0, Phase.SETTLING, timedelta(seconds=1)),
}
ENDING = {"unprotected death", "hopeless", "unknown", "agent lost"}


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("phase", Phase)
def test_every_event_has_a_defined_answer_in_every_phase(phase: Phase, name: str) -> None:
    leader = in_phase(phase)
    commands = leader.feed(EVENTS[name])
    if phase in FINAL:
        assert (leader.phase, commands) == (phase, [])
    elif name in ENDING:
        assert leader.phase is Phase.FALLING_BACK
        assert ends(commands)[0].code != 0
    elif name == "death":
        assert leader.phase is Phase.PLANNING
    else:
        assert leader.phase is phase
        assert not ends(commands)


def test_a_worker_without_a_frame_ends_the_job_with_its_code() -> None:
    (end,) = ends(Round(NODES).feed(Exited(2, 2, None)))
    assert (end.code, end.reason) == (
        2,
        "rank 2 ended with code 2 before its first frame was sealed",
    )


def test_a_rank_that_keeps_failing_at_one_iteration_ends_the_job() -> None:
    leader = Round(NODES)
    for _ in range(MAX_RETRIES):
        assert not ends(leader.feed(die(3, iteration=5)))
        drive(leader, {3}, Phase.TRAINING)
    (end,) = ends(leader.feed(die(3, iteration=5)))
    assert end.reason == "rank 3 failed 4 times at iteration 5 (--moetion-max-retries 3)"
    assert end.code == 137


def test_a_rank_may_fail_at_many_iterations() -> None:
    leader = Round(NODES)
    for iteration in range(3 * MAX_RETRIES):
        assert not ends(leader.feed(die(3, iteration=iteration)))
        drive(leader, {3}, Phase.TRAINING)


def test_when_all_have_died_their_agents_say_how_far_they_were() -> None:
    leader = Round(NODES)
    commands = feed_all(leader, [die(rank) for rank in WORLD])
    assert [c.global_rank for c in commands if isinstance(c, Replace)] == [*WORLD]
    assert (leader.phase, leader.missing()) == (Phase.REGROUPING, [*WORLD])
    drive(leader, set(WORLD), Phase.GATHERING)
    leader.feed(gathered(leader, 1))
    (facts,) = notices(leader.feed(gathered(leader, 0)), "facts")
    assert (facts.message["committed"], facts.message["dead"]) == (5, [*WORLD])
    commands = drive(leader, set(WORLD), Phase.TRAINING)
    assert notices(commands, "resume") == [Notify(WORLD, {"op": "resume", "epoch": 4})]


def test_without_a_sound_copy_of_a_frame_the_round_begins_again_without_a_death() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    drive(leader, {3}, Phase.RESTORING)
    damaged = {"global_rank": 2, "key": "frame/9", "reason": "bits differ"}
    commands = leader.feed(say(3, "damaged", epoch=1, **damaged))
    (freeze,) = notices(commands, "freeze")
    assert freeze == Notify(WORLD, {"op": "freeze", "epoch": 2, "dead": [3]})
    assert leader.phase is Phase.PLANNING
    assert leader.feed(say(2, "damaged", epoch=1, **damaged)) == []
    drive(leader, {3}, Phase.TRAINING)


def test_a_damaged_log_entry_ends_the_job_as_there_is_no_other_copy() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    drive(leader, {3}, Phase.RESTORING)
    damaged = {"global_rank": 0, "key": "boundary/9/0", "reason": "bits differ"}
    (end,) = ends(leader.feed(say(3, "damaged", epoch=1, **damaged)))
    assert end.reason == "bits differ; there is no other copy of it"
    assert end.state_lost


@pytest.mark.parametrize("lost", [True, False])
def test_a_worker_says_whether_an_older_state_would_do(lost: bool) -> None:
    leader = Round(NODES, fired=[4])
    leader.feed(say(1, "fired", index=2))
    (end,) = ends(leader.feed(say(1, "hopeless", reason="no frames", state_lost=lost)))
    assert end == End("no frames", 1, lost, (2, 4), tried=NOTHING_TRIED)


def test_what_a_recovery_misses_may_have_been_lost_by_the_failure_that_ended_it() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    drive(leader, {3}, Phase.RESTORING)
    missing = {"reason": "not in its log", "state_lost": True}
    leader.feed(die(0))
    assert leader.epoch == 2
    assert leader.feed(say(3, "hopeless", epoch=1, **missing)) == []
    assert leader.phase is Phase.PLANNING
    (end,) = ends(leader.feed(say(3, "hopeless", epoch=2, **missing)))
    assert end.reason == "not in its log"


def test_a_refusal_is_no_failure_that_any_tier_could_be_tried_against() -> None:
    (end,) = ends(Round(NODES).feed(say(1, "hopeless", reason="too much memory", refused=True)))
    assert end == End("too much memory", 1)


def flap(leader: Round, times: int, at_first: float = 0.0) -> list[Command]:
    """So many deaths of rank 3, a second apart, each recovered from but the last."""
    first = int(at_first)
    for n in range(times - 1):
        commands = leader.feed(replace(die(3, iteration=first + n), at=at_first + n))
        assert not [c for c in commands if isinstance(c, Expel | End)]
        drive(leader, {3}, Phase.TRAINING)
    return leader.feed(replace(die(3, iteration=first + times), at=at_first + times))


def test_past_the_budget_all_workers_start_anew_and_none_of_their_ends_counts() -> None:
    leader = Round(NODES, max_retries=1, budget=RestartBudget(3, 60.0))
    # One more failure of its own in that iteration would be too many.
    leader.feed(die(0))
    drive(leader, {0}, Phase.TRAINING)
    commands = flap(leader, 3)
    (expel,) = (c for c in commands if isinstance(c, Expel))
    assert expel.global_ranks == (0, 1, 2)
    assert expel.reason.startswith(
        "more than 3 recoveries within 60 s (--moetion-restart-budget 3/60); memory restart"
    )
    assert recorded(commands) == ["escalated", "detected"]
    # Some may have answered before.
    leader.feed(say(0, "report", epoch=leader.epoch, position=at(5)))
    for rank in (0, 1, 2):
        commands = leader.feed(die(rank))
        assert Replace(rank, leader.epoch, ()) in commands
    drive(leader, set(WORLD), Phase.TRAINING)
    # Here such a death is one again, and those within its budget are recovered from.
    (end,) = ends(flap(leader, 4, 10.0))
    assert (end.state_lost, end.tier, end.distrusted) == (True, Tier.SPILL, False)
    # What came last is what would have to be run again.
    assert end.committed == 14
    assert str(end.tried) == "6 localized recoveries, memory restart"


def reject(leader: Round, rank: int, iteration: int = 5) -> list[Command]:
    """A worker leaves with a result that the host refuses right behind a rebuild."""
    leader.feed(say(rank, "failed", trace=["NaN"], echo=False, rejected=True))
    return leader.feed(replace(die(rank, iteration), code=1))


def test_what_is_rejected_behind_a_rebuild_costs_those_that_were_rebuilt_and_then_everybody() -> (
    None
):
    leader = Round(NODES, max_retries=1)
    leader.feed(die(3))
    drive(leader, {3}, Phase.RESTORING)
    rebuilt = {rank: rank in (2, 3) for rank in WORLD}
    feed_all(leader, [say(r, "joined", epoch=1, rebuilt=rebuilt[r]) for r in WORLD])
    # Rank 0 meets it, and so does rank 1; it came from ranks 2 and 3.
    commands = reject(leader, 0)
    assert recorded(commands)[0] == "distrusted"
    assert [c.global_ranks for c in commands if isinstance(c, Expel)] == [(2, 3)]
    assert recorded(reject(leader, 1)) == ["detected"]
    feed_all(leader, [die(2), die(3)])
    drive(leader, {*WORLD}, Phase.GATHERING)
    leader.feed(gathered(leader, 1))
    (facts,) = notices(leader.feed(gathered(leader, 0)), "facts")
    assert facts.message["doubted"]
    # It did not help.
    commands = reject(leader, 3)
    assert [c.fields["tier"] for c in commands if isinstance(c, Record) and "tier" in c.fields] == [
        Tier.MEMORY
    ]
    assert [c.global_ranks for c in commands if isinstance(c, Expel)] == [(0, 1, 2)]
    feed_all(leader, [die(0), die(1), die(2)])
    drive(leader, {*WORLD}, Phase.TRAINING)
    (end,) = ends(reject(leader, 1))
    assert (end.state_lost, end.tier, end.distrusted) == (True, Tier.SPILL, True)
    assert end.trace is not None
    assert "memory restart" in str(end.tried)


@pytest.mark.parametrize("lowest", [Tier.SPILL, Tier.CHECKPOINT])
def test_what_was_tried_before_a_start_anew_still_counts(lowest: Tier) -> None:
    tried = Tried((1.0,), ((Tier.MEMORY, 2.0), (lowest, 3.0)))
    leader = Round(NODES, budget=RestartBudget(1, 60.0), tried=tried)
    commands = flap(leader, 2, 10.0)
    (end,) = ends(commands)
    left = lowest is Tier.SPILL
    # Behind the last one there is none.
    assert ("escalated" in recorded(commands), end.state_lost) == (left, left)
    assert end.tier is Tier.CHECKPOINT or not left
    assert str(end.tried) == f"2 localized recoveries, memory restart, {lowest}"


def test_a_lost_node_counts_as_one_failure_and_is_waited_for_in_a_memory_restart_too() -> None:
    leader = Round(NODES, replaces_nodes=True, budget=RestartBudget(1, 60.0))
    leader.feed(replace(die(3), at=1.0))
    drive(leader, {3}, Phase.TRAINING)
    commands = leader.feed(AgentLost(1, "reset", at=2.0))
    assert [c.global_ranks for c in commands if isinstance(c, Expel)] == [(0, 1)]
    assert "node-lost" in recorded(commands)
    for rank in (0, 1):
        assert Replace(rank, leader.epoch + 1, ()) in leader.feed(die(rank))
    leader.feed(AgentJoined(1))
    drive(leader, set(WORLD), Phase.TRAINING)


def test_what_has_failed_too_often_or_lost_a_node_is_no_matter_of_state() -> None:
    leader = Round(NODES, max_retries=0)
    (end,) = ends(leader.feed(die(3)))
    assert not end.state_lost
    (end,) = ends(Round(NODES).feed(AgentLost(1, "gone")))
    assert not end.state_lost


def test_a_lost_node_is_waited_for_and_its_ranks_are_replaced_on_the_next_one() -> None:
    leader = Round(NODES, replaces_nodes=True)
    commands = leader.feed(AgentLost(1, "reset"))
    assert notices(commands, "freeze") == [
        Notify((0, 1), {"op": "freeze", "epoch": 1, "dead": [2, 3]})
    ]
    assert not [c for c in commands if isinstance(c, Replace)]
    drive_survivors(leader)
    assert leader.phase is Phase.REGROUPING
    (end,) = ends(leader.feed(Expired(1, Phase.REGROUPING, timedelta(seconds=7))))
    assert "no node took the place of nodes [1] within 7 s" in end.reason
    leader = Round(NODES, replaces_nodes=True)
    leader.feed(AgentLost(1, "reset"))
    drive_survivors(leader)
    assert [c for c in leader.feed(AgentJoined(1)) if isinstance(c, Replace)] == [
        Replace(2, 1, ()),
        Replace(3, 1, ()),
    ]
    # One that dies while it starts has no position yet, and is started once more.
    assert Replace(3, 2, ()) in leader.feed(Exited(3, 1, None))


def drive_survivors(leader: Round) -> None:
    for op in ("report", "settled", "quiesced"):
        feed_all(leader, [say(r, op, epoch=leader.epoch, position=at(5)) for r in (0, 1)])


def test_what_was_given_up_is_no_fact_and_nobody_guesses_where_a_lost_rank_was() -> None:
    leader = Round(NODES, replaces_nodes=True)

    def lose(went_on: int, copies: list[Any], starts: list[Any]) -> dict[str, Any]:
        leader.feed(AgentLost(1, "reset"))
        drive_survivors(leader)
        leader.feed(AgentJoined(1))
        feed_all(leader, [say(r, "ready", epoch=leader.epoch) for r in (2, 3)])
        here = {str(r): at(5) for r in (0, 1)}
        none: dict[str, Any] = {str(r): None for r in (2, 3)}
        held = ({"2": copies}, {"2": starts})
        leader.feed(Gathered(0, leader.epoch, {}, here, {}, *held))
        commands = leader.feed(Gathered(1, leader.epoch, {}, none))
        (facts,) = notices(commands, "facts")
        joined = {"epoch": leader.epoch, "iteration": went_on}
        feed_all(leader, [say(r, "joined", **joined) for r in WORLD])
        assert leader.phase is Phase.TRAINING
        return facts.message

    def entry(kind: str, iteration: int, epoch: int) -> dict[str, Any]:
        return {"key": f"{kind}/{iteration}/x", "meta": {"epoch": epoch}}

    first = lose(4, [entry("frame", 5, 0)], [entry("header", 5, 0), entry("header", 6, 0)])
    assert first["positions"].keys() == {"0", "1"}
    assert first["starts"] == {"2": [5, 6]}
    # Training went on behind 4 in epoch 1: what was written before that of 5 is not what came.
    old = [entry("frame", 4, 0), entry("frame", 5, 0)]
    headers = [entry("header", 5, 0), entry("header", 6, 0), entry("header", 7, 1)]
    second = lose(4, [*old, entry("frame", 6, 1)], headers)
    assert [e["key"] for e in second["frames"]["2"]] == ["frame/4/x", "frame/6/x"]
    assert second["starts"] == {"2": [5, 7]}


def test_faults_that_fired_before_a_cold_start_do_not_fire_again() -> None:
    commands = Round(NODES, fired=[1, 0]).feed(Restored(12))
    assert {c.fired for c in commands if isinstance(c, Replace)} == {(0, 1)}


def test_an_exit_without_finished_is_a_failure_even_with_code_zero() -> None:
    leader = Round(NODES)
    leader.feed(die(3, code=0))
    assert leader.phase is Phase.PLANNING


def test_the_job_is_done_when_all_have_finished_and_left() -> None:
    leader = Round(NODES)
    feed_all(leader, [say(rank, "finished") for rank in WORLD])
    commands = feed_all(leader, [Exited(rank, 1 if rank == 2 else 0, at(9)) for rank in WORLD])
    assert commands == [End("", 0)]


def test_a_failure_after_others_have_finished_ends_the_job() -> None:
    leader = Round(NODES)
    leader.feed(say(0, "finished"))
    (end,) = ends(leader.feed(die(3)))
    assert "after ranks [0] had finished" in end.reason


def test_faults_that_fired_anywhere_are_told_to_every_replacement() -> None:
    leader = Round(NODES)
    feed_all(leader, [say(1, "fired", index=2), say(3, "fired", index=0)])
    assert Replace(3, 1, (0, 2)) in leader.feed(die(3))


@pytest.mark.parametrize(
    ("phase", "who"),
    [
        (Phase.PLANNING, (0, 1, 2)),
        (Phase.SETTLING, (0, 1, 2)),
        (Phase.REGROUPING, WORLD),
        (Phase.RESTORING, WORLD),
    ],
)
def test_who_keeps_a_phase_from_its_end_is_killed_and_a_new_round_begins(
    phase: Phase, who: tuple[int, ...]
) -> None:
    leader = in_phase(phase)
    record, expel = leader.feed(Expired(1, phase, timedelta(seconds=30), stuck=(1, 7)))
    assert isinstance(record, Record)
    assert isinstance(expel, Expel)
    assert expel.global_ranks == (1,)
    says = f"ranks {[*who]} did not answer within 30 s in phase {phase.name}"
    assert expel.reason.startswith(says)
    # Its end is a failure like any other.
    leader.feed(die(1))
    assert (leader.phase, leader.epoch) == (Phase.PLANNING, 2)
    # Nobody can be told from the others: all of them are.
    leader = in_phase(phase)
    (_, expel) = leader.feed(Expired(1, phase, timedelta(seconds=30)))
    assert isinstance(expel, Expel)
    assert expel.global_ranks == who


def test_what_cannot_be_killed_ends_the_job_and_so_does_an_agent_that_is_silent() -> None:
    leader = in_phase(Phase.PLANNING)
    assert not ends(leader.feed(Expired(1, Phase.PLANNING, timedelta(seconds=30), (2,))))
    (end,) = ends(leader.feed(Expired(1, Phase.PLANNING, timedelta(seconds=30), (2,))))
    assert end.state_lost
    leader = in_phase(Phase.GATHERING)
    (end,) = ends(leader.feed(Expired(1, Phase.GATHERING, timedelta(seconds=30))))
    assert end.reason.startswith("nodes [0, 1] did not answer within 30 s in phase GATHERING")


def test_a_rank_that_hangs_in_every_round_is_killed_as_often_as_it_may_fail() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    for _ in range(MAX_RETRIES):
        epoch = leader.epoch
        commands = leader.feed(Expired(epoch, Phase.PLANNING, timedelta(seconds=30), (1,)))
        assert [c for c in commands if isinstance(c, Expel)]
        assert not ends(leader.feed(die(1)))
        # The replacement hangs just so.
        drive(leader, {1, 3}, Phase.RESTORING)
        feed_all(leader, [say(r, "joined", epoch=leader.epoch) for r in (0, 2, 3)])
        expired = Expired(leader.epoch, Phase.RESTORING, timedelta(seconds=30), (1,))
        commands = leader.feed(expired)
        assert [c.global_ranks for c in commands if isinstance(c, Expel)] == [(1,)]
        (*_, last) = leader.feed(die(1))
        if isinstance(last, End):
            break
    assert isinstance(last, End)
    assert last.reason.startswith("ranks [1] did not answer within 30 s in phase RESTORING")
    assert last.state_lost


def failed(rank: int, text: str, echo: bool = False) -> Said:
    return say(rank, "failed", trace=["Traceback", f"  File of {rank}", text], echo=echo)


def test_an_exception_that_comes_again_is_shown_as_it_was_raised_first() -> None:
    leader = Round(NODES, max_retries=1)
    feed_all(leader, [failed(2, "gloo: closed", echo=True), failed(3, "ValueError: a")])
    feed_all(leader, [die(2), die(3)])
    drive(leader, {2, 3}, Phase.TRAINING)
    feed_all(leader, [failed(2, "gloo: closed", echo=True), failed(3, "ValueError: b")])
    (end,) = ends(feed_all(leader, [die(2), die(3)]))
    assert end.trace == Trace(3, ("Traceback", "  File of 3", "ValueError: a"), False)
    how = "(--moetion-max-retries 1), rank 3 first: ValueError: a"
    assert end.reason == f"rank 2 failed 2 times at iteration 5 {how}"


def test_an_exception_that_ends_the_job_at_once_is_shown_and_one_of_long_ago_is_not() -> None:
    leader = Round(NODES)
    feed_all(leader, [failed(3, "ValueError: a"), die(3)])
    drive(leader, {3}, Phase.TRAINING)
    (end,) = ends(leader.feed(Exited(2, 2, None)))
    assert end.trace is None
    leader = Round(NODES)
    leader.feed(failed(2, "gloo: closed", echo=True))
    assert ends(leader.feed(Exited(2, 2, None)))[0].trace is None
    leader = Round(NODES)
    leader.feed(failed(2, "ValueError: a"))
    (end,) = ends(leader.feed(Exited(2, 2, None)))
    assert end.trace is not None


def test_a_cold_start_is_the_death_of_everybody_at_the_iteration_of_the_spill() -> None:
    leader = Round(NODES)
    commands = leader.feed(Restored(8))
    assert [c for c in commands if isinstance(c, Replace)] == [Replace(r, 1, ()) for r in WORLD]
    assert leader.phase is Phase.REGROUPING
    commands = feed_all(leader, [say(rank, "ready", epoch=0) for rank in WORLD])
    assert Gather(1) in commands
    spilled = {"iteration": 9, "committed": 8}
    for node_rank, ranks in enumerate(NODES):
        positions = {str(rank): spilled for rank in ranks}
        commands = leader.feed(Gathered(node_rank, 1, {}, positions))
    (facts,) = notices(commands, "facts")
    assert facts.global_ranks == WORLD
    assert (facts.message["committed"], facts.message["dead"]) == (8, list(WORLD))
    going = copy.deepcopy(leader)
    drive(going, set(WORLD), Phase.TRAINING)
    assert going.phase is Phase.TRAINING
    # What would be run again if that had to be given up.
    (end,) = ends(leader.feed(say(3, "hopeless", reason="no frames", state_lost=True)))
    assert end.committed == 8


def test_a_death_in_a_cold_start_is_recovered_from_like_any_other() -> None:
    leader = Round(NODES)
    leader.feed(Restored(8))
    leader.feed(say(1, "ready", epoch=0))
    commands = leader.feed(die(1, iteration=9))
    assert Replace(1, 2, ()) in commands
    drive(leader, set(WORLD), Phase.TRAINING)
    assert leader.phase is Phase.TRAINING


class World:
    """Workers that answer what they are told, in any order, and die at any moment."""

    def __init__(self, max_deaths: int) -> None:
        self.leader = Round(NODES, max_retries=max_deaths)
        self.pending: list[Event] = []
        self.resumed: dict[int, int] = {}
        self.ended: list[End] = []
        self.dead: set[int] = set()

    def apply(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Notify():
                    for rank in command.global_ranks:
                        self.tell(rank, command.message)
                case Replace():
                    self.pending.append(say(command.global_rank, "ready", epoch=command.epoch))
                case Gather():
                    self.pending += [gathered(self.leader, node_rank) for node_rank in range(2)]
                case End():
                    self.ended.append(command)

    def tell(self, rank: int, message: dict[str, Any]) -> None:
        answers = {"freeze": "report", "verdict": "settled", "abort": "quiesced", "facts": "joined"}
        if message["op"] == "freeze":
            self.dead = set(message["dead"])
            if rank in self.dead:
                return
        if message["op"] == "resume":
            self.resumed[rank] = message["epoch"]
            return
        answer = answers[message["op"]]
        self.pending.append(say(rank, answer, epoch=message["epoch"], position=at(5)))

    def kill(self, rank: int) -> None:
        # What a dead worker had sent has been fed; what it would have sent never comes.
        self.pending = [
            e for e in self.pending if not (isinstance(e, Said) and e.global_rank == rank)
        ]
        self.apply(self.leader.feed(die(rank)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_order_of_answers_and_deaths_ends_in_training(
    data: st.DataObject,
) -> None:
    num_deaths = data.draw(st.integers(1, 6))
    world = World(num_deaths)
    deaths = 0
    while not world.ended and (deaths < num_deaths or world.leader.phase is not Phase.TRAINING):
        choices = len(world.pending) + (1 if deaths < num_deaths else 0)
        assert choices, f"stuck in {world.leader.phase}, missing {world.leader.missing()}"
        choice = data.draw(st.integers(0, choices - 1))
        if choice == len(world.pending):
            deaths += 1
            world.kill(data.draw(st.sampled_from(WORLD)))
        else:
            world.apply(world.leader.feed(world.pending.pop(choice)))
    assert not world.ended
    assert world.resumed == dict.fromkeys(WORLD, world.leader.epoch)
    assert world.leader.epoch == num_deaths


def test_copies_stand_in_for_what_an_owner_lacks_but_not_for_what_it_dropped() -> None:
    leader = Round(NODES)
    leader.feed(die(3))
    drive(leader, {3}, Phase.GATHERING)
    listed = lambda *iterations: [{"key": f"frame/{i}/x", "n": i} for i in iterations]  # noqa: E731
    positions = [{str(rank): at(9) for rank in ranks} for ranks in NODES]
    first = Gathered(0, 1, {"0": listed(9), "1": []}, positions[0], {"0": 8, "1": 0}, {})
    copies = {"0": [{"key": "frame/9/x", "n": -1}, *listed(7, 8)], "1": listed(6)}
    second = Gathered(1, 1, {"2": [], "3": []}, positions[1], {"2": 0, "3": 0}, copies)
    commands = [*leader.feed(second), *leader.feed(first)]
    (facts,) = notices(commands, "facts")
    assert facts.message["frames"] == {"0": listed(9, 8), "1": listed(6), "2": [], "3": []}


def test_how_far_logs_reach_back_is_known_of_all_but_lost_ranks() -> None:
    leader = Round(NODES, replaces_nodes=True)
    leader.feed(AgentLost(1, "reset"))
    told = {0: at(5), 1: {**at(5), "since": 4}}
    for op in ("report", "settled", "quiesced"):
        feed_all(leader, [say(r, op, epoch=1, position=told[r]) for r in told])
    leader.feed(AgentJoined(1))
    feed_all(leader, [say(r, "ready", epoch=1) for r in (2, 3)])
    headers = lambda *iterations: [{"key": f"header/{i}/x"} for i in iterations]  # noqa: E731
    here: dict[str, Any] = {str(r): told[r] for r in told}
    below = {"0": 3, "1": 3}
    leader.feed(Gathered(0, 1, {}, here, below, {}, {"2": headers(3, 4, 5)}))
    none: dict[str, Any] = {"2": None, "3": None}
    # A copy that one holder lacks another may have.
    answer = Gathered(
        1, 1, {}, none, {"2": 0, "3": 0}, {}, {"2": headers(4, 5, 6), "0": headers(9)}
    )
    (facts,) = notices(leader.feed(answer), "facts")
    assert facts.message["logged"] == {"0": 3, "1": 4}
    assert facts.message["starts"] == {"2": [3, 4, 5, 6]}


def test_a_node_with_a_broken_device_loses_its_place_where_another_can_take_it() -> None:
    leader = Round(NODES, replaces_nodes=True)
    leader.feed(die(3))
    said = say(3, "unfit", reason="device cuda:1 is broken: no answer")
    why = "rank 3 of node 1: device cuda:1 is broken: no answer"
    assert Evict(1, why) in leader.feed(said)
    assert leader.phase is Phase.PLANNING
    # From here on it is a lost node like any other.
    assert notices(leader.feed(AgentLost(1, why)), "freeze")[0].message["dead"] == [2, 3]


@pytest.mark.parametrize(("rank", "replaces_nodes"), [(3, False), (0, True)])
def test_elsewhere_a_broken_device_ends_the_job_with_its_name(
    rank: int, replaces_nodes: bool
) -> None:
    leader = Round(NODES, replaces_nodes=replaces_nodes)
    leader.feed(die(rank))
    (end,) = ends(leader.feed(say(rank, "unfit", reason="device cuda:1 is broken: no answer")))
    assert f"rank {rank} of node {rank // 2}: device cuda:1 is broken" in end.reason
    assert end.code == 137
    assert end.state_lost
