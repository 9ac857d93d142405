"""Order, slots and frames for any set of operators."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.operators import Kind
from megatron_moetion.parts import Part, complete
from megatron_moetion.schedule import (
    FramePlan,
    Schedule,
    Timeline,
    Unit,
    WindowPolicy,
    generate,
    order,
)

FAST = settings(max_examples=60, deadline=None)
SPLITS = st.integers(0, 12)
UNITS = st.lists(st.tuples(st.sampled_from(list(Kind)), st.integers(0, 10**9)), max_size=20).map(
    lambda found: [Unit(f"o{i:02}", kind, numel) for i, (kind, numel) in enumerate(found)]
)


@FAST
@given(UNITS, st.integers(1, 9), SPLITS, st.sampled_from(list(WindowPolicy)), st.integers(1, 100))
def test_in_any_window_every_part_of_every_operator_is_full_once(
    units: list[Unit], window: int, split: int, policy: WindowPolicy, number: int
) -> None:
    schedule = generate(order(units), window, policy, split)
    first = 1 + number * window
    parts = [part for i in range(first, first + window) for part in schedule.frame(i).full]
    assert len(set(parts)) == len(parts)
    assert complete(parts) == {u.name for u in units}
    counts = {part.operator: part.count for part in parts}
    assert sum(counts.values()) == len(parts)
    assert schedule.window == window


@FAST
@given(UNITS, st.integers(1, 9), SPLITS, st.integers(1, 100))
def test_a_rolling_frame_holds_every_operator_once_and_one_that_is_there_in_part_also_light(
    units: list[Unit], window: int, split: int, iteration: int
) -> None:
    frame = generate(order(units), window, WindowPolicy.ROLLING, split).frame(iteration)
    assert sorted((*complete(frame.full), *frame.light)) == sorted(u.name for u in units)
    assert frame.skipped == ()


@FAST
@given(UNITS, st.integers(1, 9), SPLITS, st.integers(1, 100), st.integers(1, 100))
def test_a_tumbling_frame_is_light_until_the_last_part_and_skips_from_then_on(
    units: list[Unit], window: int, split: int, first: int, later: int
) -> None:
    schedule = generate(order(units), window, WindowPolicy.TUMBLING, split, first)
    iteration = first + later
    frame = schedule.frame(iteration)
    opened = iteration - schedule.slot_of(iteration)
    before = [part for i in range(opened, iteration) for part in schedule.frame(i).full]
    everything = {u.name for u in units}
    assert set(frame.skipped) == complete(before)
    assert set(frame.light) == everything - complete([*before, *frame.full])


@FAST
@given(UNITS, st.integers(1, 9), st.integers(1, 12))
def test_no_part_is_larger_than_asked_for_and_nothing_is_cut_in_vain(
    units: list[Unit], window: int, split: int
) -> None:
    slots = generate(order(units), window, WindowPolicy.ROLLING, split).slots
    size = {u.name: u.numel for u in units}
    largest = -(-sum(size.values()) // split)
    for k, slot in enumerate(slots):
        for part in slot:
            if part.count > 1:
                assert part.stretch(size[part.operator]).numel <= largest < size[part.operator]
                assert any(
                    part.operator == p.operator for s in slots[:k] + slots[k + 1 :] for p in s
                )


@FAST
@given(UNITS.filter(lambda units: sum(u.numel for u in units) > 0), st.integers(1, 9))
def test_slots_keep_the_order_and_exceed_a_fair_share_by_at_most_one_operator(
    units: list[Unit], window: int
) -> None:
    ordered = order(units)
    slots = generate(ordered, window, WindowPolicy.ROLLING).slots
    assert [part for slot in slots for part in slot] == [Part(u.name) for u in ordered]
    size = {u.name: u.numel for u in units}
    share, largest = sum(size.values()) / window, max(size.values())
    assert all(sum(size[part.operator] for part in slot) <= share + largest for slot in slots)


@FAST
@given(UNITS, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_the_order_of_discovery(
    units: list[Unit], random: object
) -> None:
    shuffled = list(units)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    assert order(shuffled) == order(units)


def test_cold_experts_come_first_and_routers_last() -> None:
    units = [
        Unit("r", Kind.ROUTER, 1),
        Unit("hot", Kind.EXPERT, 1),
        Unit("cold", Kind.EXPERT, 1),
        Unit("rest", Kind.LAYER, 1),
        Unit("emb", Kind.EMBEDDING, 1),
    ]
    ordered = order(units, {"hot": 9.0, "cold": 1.0})
    assert [u.name for u in ordered] == ["cold", "hot", "emb", "rest", "r"]


def test_the_first_iteration_opens_the_first_window() -> None:
    units = [Unit(n, Kind.EXPERT, 1) for n in "abcd"]
    schedule = generate(units, 2, WindowPolicy.TUMBLING)
    a, b, c, d = (Part(n) for n in "abcd")
    assert schedule.frame(1) == FramePlan((a, b), ("c", "d"))
    assert schedule.frame(2) == FramePlan((c, d), (), ("a", "b"))
    assert schedule.frame(3) == schedule.frame(1)
    assert schedule.dense == FramePlan((a, b, c, d), ())


def test_a_large_operator_is_captured_over_several_frames_and_is_light_until_its_last_part() -> (
    None
):
    units = [Unit("small", Kind.EXPERT, 2), Unit("large", Kind.LAYER, 10)]
    rolling, tumbling = (generate(units, 3, policy, split=3) for policy in WindowPolicy)
    first, second, third = (Part("large", index, 3) for index in range(3))
    assert rolling.slots == tumbling.slots == ((Part("small"), first), (second,), (third,))
    assert [tumbling.frame(i) for i in (1, 2, 3)] == [
        FramePlan((Part("small"), first), ("large",)),
        FramePlan((second,), ("large",), ("small",)),
        FramePlan((third,), (), ("small",)),
    ]
    both = ("small", "large")
    assert [rolling.frame(i).light for i in (1, 2, 3)] == [("large",), both, both]


@pytest.mark.parametrize(("policy", "kept"), [("rolling", 6), ("tumbling", 10)])
def test_two_frames_more_than_a_base_needs_are_kept(policy: str, kept: int) -> None:
    assert generate([], 4, WindowPolicy(policy)).frames_kept == kept


EXPERTS = [f"o{i:02}" for i in range(12)]


def with_experts(window: int, policy: WindowPolicy = WindowPolicy.ROLLING) -> Schedule:
    units = [Unit(name, Kind.EXPERT, 100) for name in EXPERTS]
    units += [Unit("rest", Kind.LAYER, 250), Unit("router", Kind.ROUTER, 10)]
    return generate(order(units), window, policy, reorders=True)


@FAST
@given(st.integers(1, 9), st.lists(st.permutations(EXPERTS), min_size=1, max_size=5))
def test_over_any_new_orders_one_frame_more_than_a_window_is_complete(
    window: int, wanted: list[list[str]]
) -> None:
    schedules = [with_experts(window)]
    for experts in wanted:
        last = schedules[-1]
        schedules.append(last.reordered(experts, last.first + window))
    frames = [frame for s in schedules for frame in map(s.frame_of_slot, range(window))]
    everything = {*EXPERTS, "rest", "router"}
    for start in range(len(frames) - window):
        stretch = frames[start : start + window + 1]
        assert complete(part for frame in stretch for part in frame.full) == everything
    for before, after in itertools.pairwise(schedules):
        assert [len(parts) for parts in before.slots] == [len(parts) for parts in after.slots]
        fixed = [[p if p.operator not in EXPERTS else None for p in parts] for parts in after.slots]
        assert fixed == [
            [p if p.operator not in EXPERTS else None for p in parts] for parts in before.slots
        ]


@FAST
@given(st.integers(1, 9), st.permutations(EXPERTS))
def test_an_order_that_is_wanted_at_every_edge_is_reached(window: int, wanted: list[str]) -> None:
    schedule = with_experts(window)
    for _ in range(window):
        schedule = schedule.reordered(wanted, schedule.first + window)
    found = [part.operator for parts in schedule.slots for part in parts]
    slots = {part.operator: k for k, parts in enumerate(schedule.slots) for part in parts}
    assert [slots[name] for name in wanted] == sorted(slots[name] for name in EXPERTS)
    assert sorted(found) == sorted([*EXPERTS, "rest", "router"])


CHANGES = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from(list(WindowPolicy)), st.booleans()),
    min_size=2,
    max_size=5,
)


@FAST
@given(CHANGES, st.booleans(), st.randoms())
def test_whatever_changes_a_complete_base_is_kept_at_any_instant(
    changes: list[tuple[int, WindowPolicy, bool]], copies: bool, chance: st.DataObject
) -> None:
    (window, policy, _), *later = changes
    timeline = Timeline([with_experts(window, policy)], copies)
    iteration = 0
    everything = {*EXPERTS, "rest", "router"}
    captured = {0: timeline.newest.dense}
    for window, policy, reordered in later:
        for _ in range(40):
            iteration += 1
            timeline.forget(iteration)
            kept = [i for i in captured if i >= timeline.oldest(iteration)]
            captured = {i: captured[i] for i in kept}
            # What a peer may lack: the frame of the iteration before.
            for last in (iteration - 1, iteration - 2) if iteration > 1 else (0,):
                assert any(dense(captured, base, last, everything) for base in kept), iteration
            schedule = timeline.at(iteration)
            captured[iteration] = schedule.frame(iteration)
            if schedule.closes_at(iteration) and reordered:
                experts = list(EXPERTS)
                chance.shuffle(experts)  # type: ignore[attr-defined]  # a Random
                timeline.change(schedule.reordered(experts, iteration + 1))
        while not (schedule.closes_at(iteration) and timeline.steady):
            iteration += 1
            timeline.forget(iteration)
            schedule = timeline.at(iteration)
            captured[iteration] = schedule.frame(iteration)
        timeline.change(replace(with_experts(window, policy), first=iteration + 1))


def dense(frames: dict[int, FramePlan], base: int, last: int, everything: set[str]) -> bool:
    """Whether a reconstruction from `base` becomes dense by `last`."""
    parts: set[Part] = set()
    for iteration in range(base, last + 1):
        if iteration not in frames:
            return False
        parts |= set(frames[iteration].full)
        rest = everything - complete(parts)
        if not rest:
            return True
        if rest - set(frames[iteration].light):
            return False
    return False


def test_windows_are_numbered_through_all_changes() -> None:
    timeline = Timeline([with_experts(3)], False)
    timeline.change(replace(with_experts(2), first=7))
    timeline.change(timeline.newest.reordered(EXPERTS[::-1], 11))
    edges = [i for i in range(1, 15) if timeline.at(i).closes_at(i)]
    assert edges == [3, 6, 8, 10, 12, 14]
    assert [timeline.at(i).number(i) for i in edges] == [1, 2, 3, 4, 5, 6]


def test_a_timeline_survives_its_json_form() -> None:
    timeline = Timeline([with_experts(3)], True)
    timeline.change(replace(with_experts(2, WindowPolicy.TUMBLING), first=7))
    rows = json.loads(json.dumps(timeline.to_json()))
    again = Timeline([Schedule.from_json(row) for row in rows], True)
    assert again.schedules == timeline.schedules


def test_what_an_abort_made_undone_is_taken_back() -> None:
    timeline = Timeline([with_experts(3)], False)
    timeline.change(replace(with_experts(2), first=4))
    timeline.keep(3)
    assert timeline.newest == with_experts(3)
