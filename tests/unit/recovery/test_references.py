"""Whoever refers to an object refers to its successor, whether the heap is frozen or not."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_moetion.recovery.references import swap_references

Group = object
"""Stands for a process group: like one it is no container for the collector, and has an identity.
"""


@pytest.fixture
def frozen() -> Iterator[list[Any]]:
    """A list in a frozen heap."""
    before: list[Any] = []
    gc.freeze()
    yield before
    gc.unfreeze()


def swap(old: Group, new: Group) -> None:
    swap_references({id(old): (old, new)})


def test_dicts_lists_sets_cells_and_attributes_are_rewritten_in_place() -> None:
    old, new = Group(), Group()

    class Thing:
        pass

    thing = Thing()
    thing.group = old  # type: ignore[attr-defined]  # set like a host's object would
    as_value, as_key, listed, several = {"g": old, "x": []}, {old: []}, [1, old], {old, 2}

    def closure() -> Group:
        return held

    held = old
    swap(old, new)
    assert thing.group is new  # type: ignore[attr-defined]  # as above
    assert as_value["g"] is new
    assert next(iter(as_key)) is new
    assert listed[1] is new
    assert new in several
    assert old not in several
    assert closure() is new


def test_a_dict_that_the_collector_does_not_track_is_found_through_its_holder() -> None:
    old, new = Group(), Group()
    holder: list[Any] = [{"group": old}]
    assert not gc.is_tracked(holder[0])
    swap(old, new)
    assert holder[0]["group"] is new


def test_such_a_dict_is_found_by_its_key_too() -> None:
    old, new = Group(), Group()
    holder: list[Any] = [{old: "members"}]
    swap(old, new)
    assert list(holder[0]) == [new]


def test_tuples_and_kept_holders_go_on_referring_to_the_old_group() -> None:
    old, new = Group(), Group()
    kept, arguments = [old], (old, 1)
    swap_references({id(old): (old, new)}, [kept])
    assert kept[0] is old
    assert arguments[0] is old


def test_the_order_of_a_dict_does_not_change_where_only_a_value_is_swapped() -> None:
    old, new = Group(), Group()
    holder = {"first": old, "second": []}
    swap(old, new)
    assert list(holder) == ["first", "second"]


def test_a_slot_is_swapped() -> None:
    class Slotted:
        __slots__ = ("group",)

    old, new = Group(), Group()
    thing = Slotted()
    thing.group = old
    swap(old, new)
    assert thing.group is new


def test_a_class_attribute_is_swapped() -> None:
    old, new = Group(), Group()

    class Thing:
        group = old

    assert Thing.group is old
    swap(old, new)
    assert Thing.group is new


class Thing:
    """Refers to a group from its instances, in dicts of three kinds."""

    def __init__(self, group: Group) -> None:
        self.group, self.untracked, self.tracked = group, {"group": group}, {"group": group, "": []}


def swapped(before: list[Any], *hidden: list[Any]) -> tuple[Thing, Group]:
    """Swaps a group that only a thing refers to, and those who are told to, too."""
    thing, new = Thing(Group()), Group()
    for each in hidden:
        each.append(thing.group)
    # Nothing but these may refer to it, no frame either.
    swap_references({id(thing.group): (thing.group, new)}, (), [vars(MODULE)])
    return thing, new


MODULE = types.ModuleType("module_that_keeps_a_group")


def test_what_is_frozen_is_not_passed_where_all_references_are_found(frozen: list[Any]) -> None:
    thing, new = swapped(frozen)
    assert thing.group is thing.untracked["group"] is thing.tracked["group"] is new
    assert gc.get_freeze_count() > 0


def test_a_frozen_module_that_is_named_is_looked_at(frozen: list[Any]) -> None:
    MODULE.held = old = Group()  # type: ignore[attr-defined]  # as parallel_state does
    new = Group()
    pairs = {id(old): (old, new)}
    del old
    swap_references(pairs, (), [vars(MODULE)])
    assert MODULE.held is new
    assert gc.get_freeze_count() > 0


def test_a_reference_in_what_is_frozen_is_missed_and_looked_for(frozen: list[Any]) -> None:
    thing, new = swapped(frozen, frozen)
    assert frozen[0] is thing.group is thing.untracked["group"] is new
    assert gc.get_freeze_count() == 0


def test_references_of_those_who_keep_theirs_are_not_missed(frozen: list[Any]) -> None:
    kept, thing, new = [Group()], Thing(None), Group()
    thing.group = kept[0]
    swap_references({id(kept[0]): (kept[0], new)}, [kept])
    assert thing.group is new
    assert kept[0] is not new
    assert gc.get_freeze_count() > 0
