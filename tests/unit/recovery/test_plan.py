"""Whatever the schedule and wherever the ranks are: a plan exists, is short, uses nothing new."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.operators import Kind
from megatron_moetion.parts import Part, complete
from megatron_moetion.recovery.plan import (
    Facts,
    FrameInfo,
    NothingToRebuildFrom,
    Plan,
    Position,
    Progress,
    StagePlan,
    commit_point,
    dense_from,
    entered,
    furthest_through,
    make_plan,
    make_shard_plan,
    needs_result,
    reached,
    shard_base,
)
from megatron_moetion.schedule import FramePlan, Schedule, Unit, WindowPolicy, generate, order
from megatron_moetion.snapshot.frame import to_meta
from megatron_moetion.topology import from_pipeline_groups

MANY = settings(max_examples=50, deadline=None)


@dataclass(frozen=True)
class Scene:
    """A job with two stages of `len(schedules)` ranks; the first rank of stage 0 is dead."""

    schedules: tuple[Schedule, ...]
    facts: Facts

    def plan(self) -> StagePlan:
        width = len(self.schedules)
        topology = from_pipeline_groups(0, [(r, r + width) for r in range(width)])
        stage = make_plan(self.facts, topology).stage(0)
        assert stage is not None
        return stage

    def walk(self, rank: int, base: int) -> int:
        """Loads frames from `base` on as a replay would; where this rank has all in full."""
        operators = complete(self.schedules[rank].dense.full)
        frames = {f.iteration: f for f in self.facts.frames[rank]}
        parts: frozenset[Part] = frozenset()
        full: frozenset[str] = frozenset()
        for iteration in range(base, self.last + 1):
            parts |= frames[iteration].full
            full = complete(parts)
            # Replay of the next iteration needs weights of what is still frozen.
            assert operators - full <= frames[iteration].light
            if full == operators:
                return iteration
        raise AssertionError(f"rank {rank} never gets {operators - full}")

    @property
    def last(self) -> int:
        """The newest frame that every rank of the stage can stand on."""
        ranks = range(len(self.schedules))
        rerun = any(
            needs_result(self.facts.positions[r], self.facts.committed, r in self.facts.dead)
            for r in ranks
        )
        return self.facts.committed - 1 if rerun else self.facts.committed


@st.composite
def schedules(draw: st.DrawFn, window: int, policy: WindowPolicy) -> Schedule:
    kinds = draw(st.lists(st.sampled_from(list(Kind)), min_size=1, max_size=12))
    sizes = draw(st.lists(st.integers(0, 1000), min_size=len(kinds), max_size=len(kinds)))
    units = [
        Unit(f"o{i}", kind, numel) for i, (kind, numel) in enumerate(zip(kinds, sizes, strict=True))
    ]
    heat = {u.name: draw(st.floats(0, 1)) for u in units}
    return generate(order(units, heat), window, policy, draw(st.integers(0, 8)))


def info(schedule: Schedule, iteration: int, start: int) -> FrameInfo:
    """The frame of an iteration; that of the job's first, `start`, is dense."""
    if iteration == start:
        return FrameInfo(iteration, frozenset(schedule.dense.full), frozenset())
    plan = schedule.frame(iteration)
    return FrameInfo.from_meta(to_meta(iteration, plan, ()))


def held(schedule: Schedule, position: Position, start: int, newest: int) -> tuple[FrameInfo, ...]:
    """What is left after the `vault.drop` that begins the iteration this rank is in."""
    oldest = max(start, position.iteration - schedule.frames_kept)
    return tuple(info(schedule, i, start) for i in range(oldest, newest + 1))


@st.composite
def positions(draw: st.DrawFn, start: int, committed: int) -> tuple[Position, int]:
    """Where a rank can be when `committed` counts as done, and the newest frame it has sealed.

    Nobody passes a commit point before everybody is there, so all are within one iteration: in the
    committed one, or in the next one, which a dead rank may even have stepped.
    """
    passed = Position(committed + 1, Progress.BEFORE_COMMIT, committed, committed)
    if committed == start:
        places = [(passed, start)]
    else:
        inside = [
            (Progress.BEFORE_COMMIT, committed - 1, committed - 1),
            (Progress.STEPPING, committed, committed - 1),
            (Progress.STEPPING, committed, committed),
            (Progress.AFTER_STEP, committed, committed),
            (Progress.RETURNED, committed, committed),
        ]
        places = [(Position(committed, p, c, c - 1), newest) for p, c, newest in inside]
        places.append((passed, committed))
    ahead = replace(passed, progress=Progress.STEPPING, committed=committed + 1)
    places += [(ahead, committed), (replace(ahead, progress=Progress.AFTER_STEP), committed + 1)]
    return draw(st.sampled_from(places))


@st.composite
def scenes(draw: st.DrawFn, policy: WindowPolicy) -> Scene:
    window = draw(st.integers(1, 8))
    start = draw(st.sampled_from([0, 0, 3, 11]))
    committed = start + draw(st.integers(0, 30))
    width = draw(st.integers(1, 3))
    plans = tuple(draw(schedules(window, policy)) for _ in range(width))
    where, frames = {}, {}
    for rank, schedule in enumerate(plans):
        position, newest = draw(positions(start, committed))
        where[rank] = position
        frames[rank] = held(schedule, position, start, newest)
    for rank in range(width, 2 * width):
        where[rank] = Position(committed, Progress.RETURNED, committed, committed)
        frames[rank] = ()
    return Scene(plans, Facts(1, committed, (0,), where, frames))


def bound(policy: WindowPolicy, window: int, lag: int) -> int:
    return window - 1 + lag if policy is WindowPolicy.ROLLING else 2 * window


@pytest.mark.parametrize("policy", list(WindowPolicy))
def test_a_short_plan_exists_wherever_the_ranks_are(policy: WindowPolicy) -> None:
    @MANY
    @given(scenes(policy))
    def check(scene: Scene) -> None:
        plan, committed = scene.plan(), scene.facts.committed
        assert plan.replay == tuple(range(plan.base + 1, committed + 1))
        assert plan.base <= plan.dense_at <= scene.last <= committed
        lag = committed - scene.last
        # A replacement that is about to log runs the committed iteration again to learn what, so
        # there the newest frame is no base, even where it is complete by itself.
        newest_alone = all(
            dense_from(scene.facts.frames[r], committed, scene.last) == committed
            for r in range(len(scene.schedules))
        )
        if newest_alone and scene.facts.positions[0].iteration == committed:
            lag = 1
        assert len(plan.replay) <= bound(policy, scene.schedules[0].window, lag)

    check()


@pytest.mark.parametrize("policy", list(WindowPolicy))
def test_every_operator_of_every_rank_is_full_exactly_by_dense_at(policy: WindowPolicy) -> None:
    @MANY
    @given(scenes(policy))
    def check(scene: Scene) -> None:
        plan = scene.plan()
        walks = [scene.walk(rank, plan.base) for rank in range(len(scene.schedules))]
        assert max(walks) == plan.dense_at

    check()


@pytest.mark.parametrize("policy", list(WindowPolicy))
def test_frames_beyond_the_committed_iteration_change_nothing(policy: WindowPolicy) -> None:
    @MANY
    @given(scenes(policy))
    def check(scene: Scene) -> None:
        facts = scene.facts
        known = {
            r: tuple(f for f in frames if f.iteration <= facts.committed)
            for r, frames in facts.frames.items()
        }
        assert Scene(scene.schedules, replace(facts, frames=known)).plan() == scene.plan()

    check()


@pytest.mark.parametrize("policy", list(WindowPolicy))
def test_a_missing_frame_means_an_older_base_or_an_error_but_never_a_hole(
    policy: WindowPolicy,
) -> None:
    @MANY
    @given(scenes(policy), st.data())
    def check(scene: Scene, data: st.DataObject) -> None:
        rank = data.draw(st.integers(0, len(scene.schedules) - 1))
        gone = data.draw(st.sampled_from(scene.facts.frames[rank])).iteration
        left = tuple(f for f in scene.facts.frames[rank] if f.iteration != gone)
        hurt = replace(scene.facts, frames={**scene.facts.frames, rank: left})
        scene = Scene(scene.schedules, hurt)
        with suppress(NothingToRebuildFrom):
            scene.walk(rank, scene.plan().base)

    check()


@pytest.mark.parametrize("policy", list(WindowPolicy))
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_rank_that_lost_all_but_its_newest_frames_is_not_rebuilt(
    policy: WindowPolicy, window: int
) -> None:
    units = [Unit(f"o{i}", Kind.EXPERT, 10) for i in range(8)]
    schedule = generate(units, window, policy)
    committed = 3 * window
    there = Position(committed + 1, Progress.BEFORE_COMMIT, committed, committed)
    for kept in range(window):
        frames = tuple(info(schedule, i, 0) for i in range(committed - kept + 1, committed + 1))
        facts = Facts(1, committed, (0,), {0: there, 1: there}, {0: frames, 1: ()})
        with pytest.raises(NothingToRebuildFrom):
            Scene((schedule,), facts).plan()


def test_without_any_frame_the_error_names_stage_iteration_and_what_is_held() -> None:
    there = Position(5, Progress.BEFORE_COMMIT, 4, 4)
    facts = Facts(1, 4, (0,), {0: there, 1: there}, {0: (), 1: ()})
    with pytest.raises(NothingToRebuildFrom, match=r"stage 0 .* iteration 4: .*\{0: \[\]\}"):
        Scene((generate([], 2, WindowPolicy.ROLLING),), facts).plan()


def test_only_failed_stages_have_a_plan_and_equal_facts_give_equal_digests() -> None:
    schedule = generate([Unit("a", Kind.LAYER, 1)], 1, WindowPolicy.ROLLING)
    there = Position(5, Progress.BEFORE_COMMIT, 4, 4)
    frames = held(schedule, there, 0, 4)
    facts = Facts(2, 4, (3,), dict.fromkeys(range(4), there), dict.fromkeys(range(4), frames))
    pipelines = [(0, 2), (1, 3)]
    plans = [make_plan(facts, from_pipeline_groups(rank, pipelines)) for rank in range(4)]
    assert [s.pp_rank for s in plans[0].stages] == [1]
    assert len({p.digest for p in plans}) == 1
    assert (
        plans[0].digest
        != make_plan(replace(facts, epoch=3), from_pipeline_groups(0, pipelines)).digest
    )
    assert str(plans[0]) == "epoch 2, committed 4, dead [3]: stage 1: base 4, replay nothing"


def test_a_base_needs_light_weights_of_all_that_is_not_full_yet() -> None:
    none: frozenset[str] = frozenset()
    a, b = frozenset("a"), frozenset("b")
    full_a, full_b = frozenset([Part("a")]), frozenset([Part("b")])
    first, second = FrameInfo(1, full_a, b), FrameInfo(2, full_b, none, a)
    assert dense_from([first, second], 1, 2) == 2
    assert dense_from([first, second], 1, 1) is None
    assert dense_from([first, second], 2, 2) is None
    assert dense_from([first, FrameInfo(3, full_b, none, a)], 1, 3) is None
    hole = FrameInfo(2, frozenset(), none, a | b)
    assert dense_from([first, hole, FrameInfo(3, full_b, none, a)], 1, 3) is None


def test_an_operator_is_full_when_all_parts_of_one_count_are_in() -> None:
    a: frozenset[str] = frozenset("a")

    def frames(*parts: Part, light: frozenset[str] = a) -> list[FrameInfo]:
        return [FrameInfo(i, frozenset([part]), light) for i, part in enumerate(parts, 1)]

    assert dense_from(frames(Part("a", 1, 2), Part("a", 0, 2)), 1, 2) == 2
    assert dense_from(frames(Part("a", 0, 2), Part("a", 0, 2)), 1, 2) is None
    assert dense_from(frames(Part("a", 0, 2), Part("a", 1, 3), Part("a", 2, 3)), 1, 3) is None
    # Without light weights, what is there only in part cannot be stood on.
    assert dense_from(frames(Part("a", 0, 2), Part("a", 1, 2), light=frozenset()), 1, 2) is None


def test_the_furthest_survivor_sets_the_commit_point() -> None:
    assert commit_point([Position(committed=3), Position(committed=4)]) == 4
    assert commit_point([]) == 0


def test_positions_and_frames_survive_their_json_form() -> None:
    position = Position(7, Progress.STEPPING, 7, 6)
    assert Position.from_json(position.to_json()) == position
    plan = FramePlan((Part("a"), Part("d", 1, 3)), ("b", "d"), ("c",))
    meta = json.loads(json.dumps(to_meta(3, plan, ())))
    there = FrameInfo(3, frozenset(plan.full), frozenset("bd"), frozenset("c"))
    assert FrameInfo.from_meta(meta) == there
    assert there.operators == frozenset("abcd")


@st.composite
def shard_scenes(draw: st.DrawFn) -> tuple[list[Schedule], int, Facts]:
    """Ranks under the shard cut, some dead, with frames that may lag; and the first iteration."""
    window, start = draw(st.integers(1, 8)), draw(st.sampled_from([0, 3]))
    committed, count = start + draw(st.integers(0, 20)), draw(st.integers(1, 4))
    plans = [draw(schedules(window, WindowPolicy.ROLLING)) for _ in range(count)]
    where = [draw(positions(start, committed)) for _ in range(count)]
    # Whoever counts as further than another has waited for it.
    where = [w for w in where if w[0].committed <= min(p.iteration for p, _ in where)] or where[:1]
    dead = draw(st.sets(st.integers(0, len(where) - 1), min_size=1))
    told = {rank: position for rank, (position, _) in enumerate(where)}
    # Frames are sealed when their training steps have returned; those of who died may lag by one.
    lags = {rank: draw(st.integers(0, 1)) for rank in dead}
    sealed = {rank: max(start, reached(p) - lags.get(rank, 0)) for rank, p in told.items()}
    frames = {rank: held(plans[rank], p, start, sealed[rank]) for rank, p in told.items()}
    skipped = draw(st.sets(st.integers(start + 1, committed + 2), max_size=3))
    frames = {
        rank: tuple(replace(f, stepped=f.iteration not in skipped) for f in each)
        for rank, each in frames.items()
    }
    survivors = [p for rank, p in told.items() if rank not in dead]
    done = commit_point(survivors or told.values())
    return plans, start, Facts(1, done, tuple(sorted(dead)), told, frames)


@MANY
@given(shard_scenes())
def test_a_shard_plan_loads_each_part_once_and_has_each_update_since(
    scene: tuple[list[Schedule], int, Facts],
) -> None:
    plans, start, facts = scene
    plan = make_shard_plan(facts)
    at = plan.committed
    # Nothing is lost where the frames of all who died reach what was committed; else what they
    # lack, and of what somebody has returned from one iteration at most.
    newest = {rank: facts.frames[rank][-1].iteration for rank in facts.dead}
    assert at == min(facts.committed, *newest.values())
    assert at >= max(start, min(reached(facts.positions[rank]) for rank in facts.dead) - 1)
    rebuilt = dict(plan.shards)
    survivors = facts.positions.keys() - set(facts.dead)
    assert rebuilt.keys() == set(facts.dead) | (survivors if at < facts.committed else set())
    assert set(plan.unfinished) == {
        rank
        for rank in survivors
        if (p := facts.positions[rank]).iteration == at == facts.committed
        and p.progress is not Progress.RETURNED
    }
    for rank, base in rebuilt.items():
        frames = {f.iteration: f for f in facts.frames[rank]}
        state: dict[Part, int] = {}
        for iteration in range(base, at + 1):
            frame = frames[iteration]
            for part in state:
                assert state[part] == iteration - 1
                updated = part.operator in frame.light or not frame.stepped
                if updated or part in frame.full:
                    state[part] = iteration
            state |= dict.fromkeys(frame.full, iteration)
        assert set(state.values()) == {at}
        assert complete(state) == complete(plans[rank].dense.full)
        assert at - base < plans[rank].window or base == start


def test_who_died_where_training_goes_on_had_returned_from_it() -> None:
    parts = frozenset({Part("a")})
    frames = {0: tuple(FrameInfo(i, parts, frozenset()) for i in range(4, 8)), 1: ()}
    after = Position(7, Progress.AFTER_STEP, 7, 6)
    facts = Facts(1, 7, (0,), {0: after, 1: Position(7, Progress.STEPPING, 7, 6)}, frames)
    assert make_shard_plan(facts) == Plan(1, 7, (0,), (), ((0, 7),), (1,))
    assert entered(facts, 0, by_shard=True) == replace(after, progress=Progress.RETURNED)
    # Of the others it is asked where they are.
    late = replace(facts, frames={**frames, 0: frames[0][:-1], 1: frames[0]})
    assert make_shard_plan(late) == Plan(1, 6, (0,), (), ((0, 6), (1, 6)))
    assert entered(late, 0, by_shard=True) == after


def test_a_survivor_whose_gather_was_cut_in_an_earlier_round_is_not_forgotten() -> None:
    parts = frozenset({Part("a")})
    cut = Position(7, Progress.AFTER_STEP, 7, 6, gathered=False)
    frames = {0: (FrameInfo(7, parts, frozenset()),), 1: ()}
    facts = Facts(1, 7, (0,), {0: Position(7, Progress.RETURNED, 7, 7), 1: cut}, frames)
    assert make_shard_plan(facts).unfinished == (1,)
    assert Position.from_json(cut.to_json()) == cut


def test_without_the_gradient_of_a_step_there_is_no_base_unless_the_step_was_left_out() -> None:
    a, b = Part("a"), Part("b")

    def frames(light: frozenset[str], stepped: bool) -> list[FrameInfo]:
        first = FrameInfo(1, frozenset([a]), frozenset(["b"]))
        return [first, FrameInfo(2, frozenset([b]), light, frozenset(["a"]), stepped)]

    assert shard_base(frames(frozenset(["a"]), True), 2) == 1
    assert shard_base(frames(frozenset(), True), 2) is None
    assert shard_base(frames(frozenset(), False), 2) == 1


def test_where_no_iteration_can_be_rebuilt_a_shard_plan_says_so() -> None:
    where = Position(6, Progress.BEFORE_COMMIT, 5, 5)
    with pytest.raises(NothingToRebuildFrom, match="no iteration up to 5 can be rebuilt"):
        make_shard_plan(Facts(1, 5, (0,), {0: where}, {0: ()}))


def test_a_rank_that_went_with_its_node_limits_how_far_all_go_by_what_was_copied() -> None:
    parts = frozenset({Part("a")})
    frames = tuple(FrameInfo(i, parts, frozenset()) for i in range(3, 8))
    here = Position(8, Progress.BEFORE_COMMIT, 7, 7)
    copied = {0: frames, 1: frames[:4]}

    def facts(*starts: int) -> Facts:
        return Facts(1, 7, (1,), {0: here}, copied, {1: frozenset(starts)})

    # A base of 6, but not of 7; then what it begins 7 with lacks, too.
    assert make_shard_plan(facts(6, 7, 8)).shards == ((0, 6), (1, 6))
    assert make_shard_plan(facts(5, 6)).committed == 5
    # Interludes before that iteration are none of its business.
    begins = Position(6, Progress.BEFORE_COMMIT, 5, 5, ended=(6, 0))
    assert entered(facts(5, 6), 1, by_shard=True) == begins
    assert entered(facts(5, 6), 0, by_shard=True) == here
    with pytest.raises(NothingToRebuildFrom):
        make_shard_plan(facts())


def test_how_far_anybody_has_been_is_known_from_those_that_went_back_too() -> None:
    # One is in iteration 9 for the first time; a first attempt has sent it back to 7.
    before, ended = Progress.BEFORE_COMMIT, (9, 0)
    back = Position(7, before, 6, 6, ended=ended)
    returned = Position(7, Progress.RETURNED, 7, 7, ended=(7, 0))
    assert reached(back) == 6
    assert furthest_through([back, returned]) == 8
    assert furthest_through([returned]) == 7
