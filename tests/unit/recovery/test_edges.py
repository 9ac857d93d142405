"""The newest bases are those that trying all of them finds."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.recovery.edges import Unfed, newest_bases

STAGES = st.integers(0, 3)
BASES = st.dictionaries(
    STAGES, st.sets(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=4
)
EDGES = st.dictionaries(st.tuples(STAGES, STAGES), st.none() | st.integers(0, 7), max_size=8)


def fed(bases: dict[int, int], edges: dict[tuple[int, int], int | None]) -> bool:
    """Whether each replayed iteration is in the neighbour's log or made again by it."""
    return all(
        (since is not None and since <= bases[stage] + 1)
        or (sender in bases and bases[sender] <= bases[stage])
        for (stage, sender), since in edges.items()
    )


@settings(max_examples=500, deadline=None)
@given(BASES, EDGES)
def test_no_other_bases_are_newer_for_any_stage(
    candidates: dict[int, set[int]], edges: dict[tuple[int, int], int | None]
) -> None:
    edges = {e: since for e, since in edges.items() if e[0] in candidates and e[0] != e[1]}
    tried = (dict(zip(candidates, each, strict=True)) for each in product(*candidates.values()))
    possible = [bases for bases in tried if fed(bases, edges)]
    if not possible:
        with pytest.raises(Unfed):
            newest_bases(candidates, edges)
        return
    newest = {stage: max(bases[stage] for bases in possible) for stage in candidates}
    assert newest_bases(candidates, edges) == newest
    assert newest in possible


def test_two_stages_that_lost_what_they_sent_each_other_begin_together() -> None:
    assert newest_bases({1: {3, 4}, 2: {2, 3, 5}}, {(1, 2): None, (2, 1): None}) == {1: 3, 2: 3}


def test_a_log_that_reaches_far_enough_back_binds_nobody() -> None:
    assert newest_bases({1: {3}, 2: {2}}, {(1, 2): 4, (2, 1): 3}) == {1: 3, 2: 2}
    with pytest.raises(Unfed, match="stage 2 lacks what stage 1 sent it"):
        newest_bases({1: {3}, 2: {2}}, {(1, 2): 4, (2, 1): 4})
    with pytest.raises(Unfed, match="stage 1 lacks what stage 0 sent it"):
        newest_bases({1: {3}}, {(1, 0): 5})
