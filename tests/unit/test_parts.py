"""Parts of an operator cut every tensor without a gap and without an overlap."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.parts import Part, Stretch, complete, covered, missing, within

MANY = settings(max_examples=100, deadline=None)
PARTS = st.integers(1, 9).flatmap(
    lambda count: st.integers(0, count - 1).map(lambda index: Part("o", index, count))
)
SETS = st.lists(PARTS, max_size=8)


def elements(stretches: list[Stretch]) -> list[int]:
    return [element for start, end in stretches for element in range(start, end)]


@MANY
@given(st.integers(0, 200), st.integers(1, 20))
def test_all_parts_of_one_count_hold_every_element_once(numel: int, count: int) -> None:
    stretches = [Part("o", index, count).stretch(numel) for index in range(count)]
    assert elements(stretches) == list(range(numel))
    assert max(s.numel for s in stretches) - min(s.numel for s in stretches) <= 1


@MANY
@given(SETS, st.integers(0, 60))
def test_what_is_covered_and_what_is_missing_are_the_two_halves_of_a_tensor(
    parts: list[Part], numel: int
) -> None:
    inside = set(elements([part.stretch(numel) for part in parts]))
    assert elements(covered(parts, numel)) == sorted(inside)
    assert elements(missing(parts, numel)) == [e for e in range(numel) if e not in inside]


@MANY
@given(SETS, st.integers(0, 60), PARTS)
def test_a_part_is_cut_into_what_is_missing_and_what_is_there(
    parts: list[Part], numel: int, part: Part
) -> None:
    limits = part.stretch(numel)
    halves = [within(found(parts, numel), limits) for found in (covered, missing)]
    assert sorted(elements(halves[0]) + elements(halves[1])) == elements([limits])
    assert all(stretch.numel > 0 for half in halves for stretch in half)


@MANY
@given(SETS)
def test_a_complete_operator_lacks_no_element_of_any_tensor(parts: list[Part]) -> None:
    if complete(parts):
        assert all(missing(parts, numel) == [] for numel in (0, 1, 7, 60))


def test_parts_of_different_counts_make_no_operator_complete() -> None:
    halves = [Part("a", 0, 2), Part("a", 1, 2)]
    assert complete([*halves, Part("b", 0, 2), Part("b", 1, 3), Part("c")]) == {"a", "c"}
    assert complete([halves[0], halves[0]]) == frozenset()


def test_a_part_survives_its_json_form() -> None:
    part = Part("layer.0", 2, 5)
    assert Part.from_json(json.loads(json.dumps(part.to_json()))) == part
