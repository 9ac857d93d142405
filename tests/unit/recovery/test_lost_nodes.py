"""Whichever nodes are lost under the stage cut and however far their copies are behind: what is
planned can be carried out, and as long as copies are in time there is a plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import info, positions, schedules

from megatron_moetion.parts import Part, complete
from megatron_moetion.recovery.plan import (
    Facts,
    FrameInfo,
    NothingToRebuildFrom,
    Plan,
    Position,
    Progress,
    entered,
    make_plan,
    needs_result,
)
from megatron_moetion.schedule import Schedule, WindowPolicy
from megatron_moetion.topology import Topology, from_pipeline_groups

MANY = settings(max_examples=150, deadline=None)


@dataclass(frozen=True)
class Scene:
    """A job of which nodes are lost.

    Attributes:
        schedules: of each rank.
        in_time: no copy is further behind than frames and logs are kept for.
    """

    schedules: tuple[Schedule, ...]
    topology: Topology
    facts: Facts
    start: int
    in_time: bool

    def plan(self) -> Plan:
        return make_plan(self.facts, self.topology)


@st.composite
def scenes(draw: st.DrawFn, policy: WindowPolicy) -> Scene:
    width, stages = draw(st.integers(1, 2)), draw(st.integers(2, 4))
    ranks = range(width * stages)
    topology = from_pipeline_groups(
        0, [tuple(range(w, len(ranks), width)) for w in range(width)], draw(st.booleans())
    )
    window, start = draw(st.integers(1, 5)), draw(st.sampled_from([0, 7]))
    committed = start + draw(st.integers(0, 20))
    plans = tuple(draw(schedules(window, policy)) for _ in ranks)
    kept = plans[0].frames_kept + plans[0].lag_bound
    # Node 0 is never lost, and whoever lives is within one iteration of all others.
    lost = draw(st.sets(st.sampled_from(ranks[1:]), min_size=1))
    crashed = draw(st.sets(st.sampled_from(ranks), max_size=2)) - lost
    lag = draw(st.integers(0, plans[0].lag_bound + draw(st.sampled_from([0, 0, 3]))))
    where, frames, starts, logged = {}, {}, {}, {}
    for rank in ranks:
        position, newest = draw(positions(start, committed))
        if position.committed > committed and rank not in crashed:
            position, newest = Position(committed + 1, Progress.BEFORE_COMMIT, committed), committed
        oldest = max(start, position.iteration - kept)
        if rank in lost:
            # It was as far as anybody can be when the others are where they are.
            late = draw(st.integers(0, lag))
            oldest = max(start, draw(st.integers(committed, committed + 1)) - kept)
            newest = max(start, newest - late)
            begun = committed - draw(st.sampled_from([0] * 9 + [1]))
            starts[rank] = frozenset(range(max(start + 1, oldest), begun + 1))
            if committed == start:
                starts[rank] = frozenset([start + 1])
        else:
            since = draw(st.sampled_from([0, 0, 0, committed - 1]))
            where[rank] = replace(position, since=since)
            logged[rank] = max(since, oldest)
        frames[rank] = tuple(info(plans[rank], i, start) for i in range(oldest, newest + 1))
    dead = tuple(sorted(lost | crashed))
    facts = Facts(1, committed, dead, where, frames, starts, logged)
    in_time = (
        lag <= plans[0].lag_bound
        and all(since <= committed + 1 - kept or since <= start for since in logged.values())
        and all(committed in starts[r] or committed == start for r in lost)
    )
    return Scene(plans, topology, facts, start, in_time)


def walks(scene: Scene, plan: Plan) -> Iterable[tuple[int, int, int]]:
    """(rank, base, iteration at which it has all in full) of each rank that is rebuilt."""
    for stage in plan.stages:
        for rank in scene.topology.stage(stage.pp_rank):
            operators = complete(scene.schedules[rank].dense.full)
            known = {f.iteration: f for f in scene.facts.frames[rank]}
            parts: frozenset[Part] = frozenset()
            for iteration in range(stage.base, plan.committed + 1):
                parts |= known[iteration].full
                # Replay of the next iteration needs weights of what is still frozen.
                assert operators - complete(parts) <= known[iteration].light
                if complete(parts) == operators:
                    yield rank, stage.base, iteration
                    break
            else:
                raise AssertionError(f"rank {rank} never gets all of {operators}")


@pytest.mark.parametrize("policy", list(WindowPolicy))
def test_what_a_plan_needs_is_there_or_is_made_again_in_time(policy: WindowPolicy) -> None:
    @MANY
    @given(scenes(policy))
    def check(scene: Scene) -> None:
        facts, topology = scene.facts, scene.topology
        try:
            plan = scene.plan()
        except NothingToRebuildFrom:
            assert not scene.in_time
            return
        bases = {stage.pp_rank: stage.base for stage in plan.stages}
        assert bases.keys() == topology.stages_of(facts.dead)
        for rank, base, dense_at in walks(scene, plan):
            position = entered(facts, rank)
            again = needs_result(position, plan.committed, rank in facts.dead)
            # What it returns is learned in a replay, for which its state is complete before.
            assert dense_at < plan.committed or not again
            for iteration in range(base + 1, plan.committed + 1):
                assert rank not in facts.lost or iteration in facts.starts[rank]
                for sender in topology.senders(topology.pp_ranks[rank]):
                    made = bases.get(topology.pp_ranks[sender], iteration) < iteration
                    there = sender not in facts.lost and facts.logged[sender] <= iteration
                    assert made or there

    check()


@pytest.mark.parametrize("policy", list(WindowPolicy))
def test_lost_ranks_take_part_in_whatever_the_others_wait_for(policy: WindowPolicy) -> None:
    @MANY
    @given(scenes(policy))
    def check(scene: Scene) -> None:
        facts = scene.facts
        try:
            plan = scene.plan()
        except NothingToRebuildFrom:
            return
        (where,) = {entered(facts, rank) for rank in facts.lost}
        if where.iteration == plan.committed:
            assert needs_result(where, plan.committed, dead=True)
        else:
            at = plan.committed
            assert where == Position(at + 1, Progress.BEFORE_COMMIT, at, at, ended=(at + 1, 0))
            assert all(p.iteration > plan.committed for p in facts.positions.values())

    check()


def frame(iteration: int) -> FrameInfo:
    """Of a rank with two operators and a window of two."""
    full, light = ("a", "b") if iteration % 2 else ("b", "a")
    return FrameInfo(iteration, frozenset([Part(full)]), frozenset([light]))


def facts(dead: tuple[int, ...], lost: tuple[int, ...], **changes: object) -> Facts:
    """Four stages of one rank each, in iteration 9; frames 3 to 8 are there."""
    there = Position(9, Progress.BEFORE_COMMIT, 8, 8)
    frames = tuple(frame(i) for i in range(3, 9))
    found = Facts(
        1, 8, tuple(sorted({*dead, *lost})),
        {rank: there for rank in range(4) if rank not in lost},
        dict.fromkeys(range(4), frames),
        {rank: frozenset(range(4, 10)) for rank in lost},
        {rank: 4 for rank in range(4) if rank not in lost},
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


LINE = from_pipeline_groups(0, [(0, 1, 2, 3)])


def bases(facts: Facts, topology: Topology = LINE) -> dict[int, int]:
    return {s.pp_rank: s.base for s in make_plan(facts, topology).stages}


def test_a_lost_stage_begins_early_enough_for_what_its_neighbours_may_need_next() -> None:
    # It could begin with 6. A neighbour that crashes next begins there too, or with 5 if its node
    # is lost and a copy lags.
    assert bases(facts((1,), ())) == {1: 7}
    assert bases(facts((), (1,))) == {1: 5}
    # Where no frame is that old, it does what it can.
    newer = {**facts((), (1,)).frames, 1: tuple(frame(i) for i in (6, 7, 8))}
    assert bases(facts((), (1,), frames=newer)) == {1: 6}


def test_neighbours_that_are_lost_together_begin_together() -> None:
    older = {**facts((), ()).frames, 3: tuple(frame(i) for i in (3, 4, 5, 6))}
    assert bases(facts((), (2, 3), frames=older)) == {2: 5, 3: 5}
    assert bases(facts((), (1, 3), frames=older)) == {1: 5, 3: 5}


def test_a_stage_that_only_crashed_begins_no_earlier_than_what_a_lost_neighbour_sends() -> None:
    # Stage 0 crashed, stage 1 is lost and can begin with 6 at the latest.
    newer = {**facts((), ()).frames, 1: tuple(frame(i) for i in (6, 7, 8))}
    assert bases(facts((0,), (1,), frames=newer)) == {0: 7, 1: 6}
    only = {**newer, 0: tuple(frame(i) for i in (4, 5))}
    with pytest.raises(NothingToRebuildFrom, match="what stage 1 sent it is in no log any more"):
        make_plan(facts((0,), (1,), frames=only), LINE)


def test_what_a_replaced_node_no_longer_has_binds_its_neighbours() -> None:
    sent = {0: 4, 1: 4, 2: 9, 3: 4}
    with pytest.raises(NothingToRebuildFrom, match=r"stage 1 .* what stage 2 sent it"):
        make_plan(facts((1,), (), logged=sent), LINE)
    assert bases(facts((1,), (), logged={**sent, 2: 8})) == {1: 7}


def test_stages_are_neighbours_over_the_ends_only_where_they_are_interleaved() -> None:
    sent = {0: 4, 1: 4, 2: 4, 3: 9}
    assert bases(facts((0,), (), logged=sent)) == {0: 7}
    with pytest.raises(NothingToRebuildFrom, match="what stage 3 sent it"):
        make_plan(facts((0,), (), logged=sent), from_pipeline_groups(0, [(0, 1, 2, 3)], wraps=True))


def test_without_the_begin_of_the_committed_iteration_nobody_may_wait_in_it() -> None:
    late = Position(8, Progress.AFTER_STEP, 8, 7)
    begun = {1: frozenset({4, 5, 6, 7})}
    lacking = facts((), (1,), starts=begun)
    assert entered(lacking, 1) == Position(9, Progress.BEFORE_COMMIT, 8, 8, ended=(9, 0))
    with pytest.raises(NothingToRebuildFrom, match=r"begin with by rank: since \{1: 9\}"):
        make_plan(lacking, LINE)
    waiting = replace(lacking, positions={**lacking.positions, 0: late})
    with pytest.raises(NothingToRebuildFrom, match=r"ranks \[0\] are in iteration 8, which"):
        make_plan(waiting, LINE)
