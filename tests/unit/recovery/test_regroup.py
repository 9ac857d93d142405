"""Groups are made again under a new epoch, and whoever held an old one holds its successor."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_moetion.recovery.regroup import GroupRecorder

# One pair of ranks answers for both files, so their tests are dealt out together.
pytestmark = pytest.mark.xdist_group("two ranks")


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
