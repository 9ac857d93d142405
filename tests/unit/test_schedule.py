"""Order, slots and frames for any set of operators."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.operators import Kind
from megatron_moetion.schedule import FramePlan, Unit, WindowPolicy, generate, order

FAST = settings(max_examples=60, deadline=None)
UNITS = st.lists(st.tuples(st.sampled_from(list(Kind)), st.integers(0, 10**9)), max_size=20).map(
    lambda found: [Unit(f"o{i:02}", kind, numel) for i, (kind, numel) in enumerate(found)]
)


@FAST
@given(UNITS, st.integers(1, 9), st.sampled_from(list(WindowPolicy)), st.integers(1, 100))
def test_in_any_window_every_operator_is_full_once(
    units: list[Unit], window: int, policy: WindowPolicy, number: int
) -> None:
    schedule = generate(order(units), window, policy)
    first = 1 + number * window
    names = [n for i in range(first, first + window) for n in schedule.frame(i).full]
    assert sorted(names) == sorted(u.name for u in units)
    assert schedule.window == window


@FAST
@given(UNITS, st.integers(1, 9), st.integers(1, 100))
def test_a_rolling_frame_holds_every_operator_once(
    units: list[Unit], window: int, iteration: int
) -> None:
    frame = generate(order(units), window, WindowPolicy.ROLLING).frame(iteration)
    assert sorted((*frame.full, *frame.light)) == sorted(u.name for u in units)
    assert frame.skipped == ()


@FAST
@given(UNITS, st.integers(1, 9), st.integers(1, 100))
def test_a_tumbling_frame_names_what_it_skips_because_it_was_full_in_this_window(
    units: list[Unit], window: int, iteration: int
) -> None:
    schedule = generate(order(units), window, WindowPolicy.TUMBLING)
    frame = schedule.frame(iteration)
    everything = (*frame.full, *frame.light, *frame.skipped)
    assert sorted(everything) == sorted(u.name for u in units)
    opened = iteration - schedule.slot_of(iteration)
    before = [n for i in range(opened, iteration) for n in schedule.frame(i).full]
    assert sorted(frame.skipped) == sorted(before)


@FAST
@given(UNITS.filter(lambda units: sum(u.numel for u in units) > 0), st.integers(1, 9))
def test_slots_keep_the_order_and_exceed_a_fair_share_by_at_most_one_operator(
    units: list[Unit], window: int
) -> None:
    ordered = order(units)
    slots = generate(ordered, window, WindowPolicy.ROLLING).slots
    assert [n for slot in slots for n in slot] == [u.name for u in ordered]
    size = {u.name: u.numel for u in units}
    share, largest = sum(size.values()) / window, max(size.values())
    assert all(sum(size[n] for n in slot) <= share + largest for slot in slots)


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
    assert schedule.frame(1) == FramePlan(("a", "b"), ("c", "d"))
    assert schedule.frame(2) == FramePlan(("c", "d"), (), ("a", "b"))
    assert schedule.frame(3) == schedule.frame(1)


@pytest.mark.parametrize(("policy", "kept"), [("rolling", 6), ("tumbling", 10)])
def test_two_frames_more_than_a_base_needs_are_kept(policy: str, kept: int) -> None:
    assert generate([], 4, WindowPolicy(policy)).frames_kept == kept
