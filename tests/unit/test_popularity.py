"""Experts are counted in four ways, and put in order again only when enough has changed."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_moetion.operators import Kind
from megatron_moetion.popularity import (
    MEASURES,
    History,
    Load,
    Measure,
    TimeDecayed,
    hard_count,
    needs_reorder,
)
from megatron_moetion.schedule import Unit, order

MANY = settings(max_examples=100, deadline=None)
NAMES = [f"expert.{i}" for i in range(6)]
LOADS = st.builds(
    Load,
    st.integers(0, 1000),
    st.floats(0, 1000),
    st.one_of(st.just(float("inf")), st.floats(0, 900)),
)
HISTORIES = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, LOADS)), max_size=8)
MEASURE = st.sampled_from(list(MEASURES.values()))
COUNTS = st.fixed_dictionaries(dict.fromkeys(NAMES, st.integers(0, 1000)))


@MANY
@given(HISTORIES, MEASURE, st.data())
def test_more_of_everything_never_makes_an_expert_less_popular(
    history: list[dict[str, Load]], measure: Measure, data: st.DataObject
) -> None:
    assume(history)
    name = data.draw(st.sampled_from(NAMES))
    index = data.draw(st.integers(0, len(history) - 1))
    was = history[index][name]
    more = Load(was.tokens + data.draw(st.integers(0, 50)), was.gates + 1, was.capacity)
    busier = [*history[:index], {**history[index], name: more}, *history[index + 1 :]]
    before, after = measure(history), measure(busier)
    assert after.pop(name) >= before.pop(name)
    assert after == before


@MANY
@given(HISTORIES, MEASURE)
def test_every_expert_has_a_popularity_of_at_least_nothing(
    history: list[dict[str, Load]], measure: Measure
) -> None:
    assert set(measure(history)) == (set(NAMES) if history else set())
    assert all(value >= 0 for value in measure(history).values())


@MANY
@given(HISTORIES, MEASURE, st.randoms(use_true_random=False))
def test_the_order_is_coldest_first_with_routers_and_layers_last_whatever_the_measure(
    history: list[dict[str, Load]], measure: Measure, random: object
) -> None:
    units = [Unit(name, Kind.EXPERT, 1) for name in NAMES]
    units += [Unit("rest", Kind.LAYER, 1), Unit("router", Kind.ROUTER, 1)]
    random.shuffle(units)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    popularity = measure(history)
    names = [unit.name for unit in order(units, popularity)]
    assert names[-2:] == ["rest", "router"]
    found = [popularity.get(name, 0.0) for name in names[:-2]]
    assert found == sorted(found)


def popular(measure: Measure, *history: dict[str, Load]) -> list[str]:
    found = measure(history)
    return sorted(found, key=lambda name: found[name])


def test_the_four_measures_disagree_where_they_should() -> None:
    history = [
        {"early": Load(100, 10.0), "late": Load(0, 20.0), "full": Load(500, 5.0, capacity=30)},
        {"early": Load(0, 10.0), "late": Load(90, 20.0), "full": Load(0, 5.0, capacity=30)},
    ]
    assert popular(MEASURES["hard-count"], *history) == ["late", "early", "full"]
    assert popular(MEASURES["soft-count"], *history) == ["full", "early", "late"]
    assert popular(MEASURES["capacity-aware"], *history) == ["full", "late", "early"]
    assert popular(TimeDecayed(half_life=1.0), *history) == ["early", "late", "full"]


def test_a_token_counts_half_after_the_half_life() -> None:
    history: History = [{"a": Load(8)}, {"a": Load(0)}, {"a": Load(1)}]
    assert TimeDecayed(half_life=2.0)(history) == {"a": 5.0}


@MANY
@given(COUNTS, st.integers(1, 50))
def test_the_same_shares_ask_for_no_new_order(counts: dict[str, float], times: int) -> None:
    assume(sum(counts.values()))
    assert not needs_reorder(counts, counts)
    # A power of two, as shares are floating-point numbers.
    assert not needs_reorder(counts, {name: value * 2**times for name, value in counts.items()})


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ([100, 100, 100, 100, 100, 100, 100, 100], False),
        # Exactly a quarter of the experts, by more than 10 %.
        ([112, 88, 100, 100, 100, 100, 100, 100], True),
        ([110, 90, 100, 100, 100, 100, 100, 100], False),
        # By much, but only an eighth: the others' shares move by less than 10 %.
        ([150, 100, 100, 100, 100, 100, 100, 100], False),
    ],
)
def test_a_new_order_takes_more_than_ten_percent_on_a_quarter_of_the_experts(
    now: list[float], expected: bool
) -> None:
    before = {f"e{i}": 100.0 for i in range(8)}
    assert needs_reorder(before, {f"e{i}": n for i, n in enumerate(now)}) is expected


def test_an_expert_that_is_used_for_the_first_time_has_changed() -> None:
    assert needs_reorder({"a": 10.0, "b": 0.0}, {"a": 10.0, "b": 1.0})
    assert not needs_reorder({}, {})
    assert hard_count([]) == {}
