"""Order, slots and frames for any set of operators."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.operators import Kind
from megatron_moetion.parts import Part, complete
from megatron_moetion.schedule import FramePlan, Unit, WindowPolicy, generate, order

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
