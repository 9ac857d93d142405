"""Groups are made again under a new epoch, and whoever held an old one holds its successor."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_moetion.recovery.regroup import GroupRecorder, swap_references

Group = object
"""Stands for a process group: like one it is no container for the collector, and has an identity.
"""


@pytest.mark.parametrize("epoch", ["first", "second"])
class TestTwoRealRanks:
    def test_all_references_are_swapped(self, two_ranks: list[dict[str, Any]], epoch: str) -> None:
        for rank in two_ranks:
            holders = rank[epoch]["holders"]
            assert [how for how, swapped in holders.items() if not swapped] == []
            assert rank[epoch]["swapped"]
            assert not rank[epoch]["new is old"]

    def test_groups_work(self, two_ranks: list[dict[str, Any]], epoch: str) -> None:
        for rank in two_ranks:
            assert rank["before"] == [3.0, 3.0]
            assert set(rank[epoch]["totals"]) == {3.0}

    def test_names_and_membership_are_stable(
        self, two_ranks: list[dict[str, Any]], epoch: str
    ) -> None:
        assert two_ranks[0][epoch]["members"] == [2, 2, 1]
        assert two_ranks[1][epoch]["members"] == [2, 2]
        assert all(rank[epoch]["names"] for rank in two_ranks)
        assert all(rank[epoch]["old name"] == "g0" for rank in two_ranks)


def test_a_rebuild_that_was_given_up_leaves_nothing_behind(
    two_ranks: list[dict[str, Any]],
) -> None:
    for rank in two_ranks:
        before, after = rank["held"]
        # Torch may hold one connection to the store less than before, which is no leak.
        assert all(after[name] <= before[name] for name in before), (before, after)


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


def test_groups_are_found_by_description_and_unknown_ones_are_refused() -> None:
    recorder = GroupRecorder()
    first, second = object(), object()
    recorder.record(first, [0, 1], {"group_desc": "PP"})
    recorder.record(second, [2, 3], {"group_desc": "PP"})
    recorder.record(object(), None, {})
    assert recorder.described("PP") == [(0, 1), (2, 3)]
    assert [recorder.name(g) for g in (None, first, second)] == ["world", "g0", "g1"]
    assert recorder.current(first) is first
    with pytest.raises(KeyError, match="not created by"):
        recorder.name(object())


def test_the_end_of_an_old_group_is_not_waited_for_where_a_dropped_collective_never_ends() -> None:
    store, limit = dist.HashStore(), timedelta(seconds=60)
    with ThreadPoolExecutor() as pool:
        make = lambda rank: dist.ProcessGroupGloo(store, rank, 2, limit)  # noqa: E731
        groups = list(pool.map(make, (0, 1)))
    peer = groups.pop()
    groups[0].allreduce([torch.ones(1)])
    recorder = GroupRecorder()
    recorder._stale[0] = (groups.pop(), "g0")
    recorder.forget_stale()
    assert not recorder.waits.all_ended(), "it was waited for until the group's timeout"
    peer.allreduce([torch.ones(1)]).wait()
    while not recorder.waits.all_ended():
        os.sched_yield()
