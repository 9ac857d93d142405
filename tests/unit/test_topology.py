"""Stages, neighbours and edges out of the pipeline groups."""

import pytest

from megatron_moetion.topology import from_pipeline_groups

PIPELINES = [(0, 2, 4), (1, 3, 5)]


def test_a_stage_is_all_ranks_with_the_same_pipeline_rank() -> None:
    topology = from_pipeline_groups(3, PIPELINES)
    assert [topology.stage(p) for p in range(topology.num_stages)] == [(0, 1), (2, 3), (4, 5)]
    assert topology.pp_rank == 1
    assert topology.world_size == 6
    assert topology.stages_of([1, 4]) == {0, 2}


def test_neighbours_are_cyclic_and_stay_in_the_pipeline() -> None:
    topology = from_pipeline_groups(0, PIPELINES)
    assert topology.next_ranks == (2, 3, 4, 5, 0, 1)
    assert topology.prev_ranks == (4, 5, 0, 1, 2, 3)
    assert all(topology.prev_ranks[topology.next_ranks[r]] == r for r in range(6))


def test_what_is_sent_to_a_stage_goes_over_the_ends_only_where_stages_are_interleaved() -> None:
    topology = from_pipeline_groups(0, PIPELINES)
    assert [topology.senders(p) for p in range(3)] == [[2, 3], [0, 1, 4, 5], [2, 3]]
    wraps = from_pipeline_groups(0, PIPELINES, wraps=True)
    assert [wraps.senders(p) for p in range(3)] == [[2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 3]]
    assert from_pipeline_groups(0, [(0,), (1,)], wraps=True).senders(0) == []


def test_a_group_spans_stages_when_two_members_are_in_different_ones() -> None:
    topology = from_pipeline_groups(0, PIPELINES)
    assert topology.spans_stages([0, 2])
    assert not topology.spans_stages([0, 1])
    assert not topology.spans_stages([5])


def test_one_stage_is_its_own_neighbour() -> None:
    topology = from_pipeline_groups(0, [(0,), (1,)])
    assert topology.next_ranks == topology.prev_ranks == (0, 1)
    assert not topology.spans_stages([0, 1])


@pytest.mark.parametrize("pipelines", [[(0, 1), (1, 2)], [(0, 2)], [(1, 2)]])
def test_groups_that_do_not_cover_each_rank_once_are_refused(
    pipelines: list[tuple[int, ...]],
) -> None:
    with pytest.raises(ValueError, match="do not cover ranks"):
        from_pipeline_groups(0, pipelines)
