"""The failure matrix: its rows are what happened, and what is asked for leaves no gap."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from megatron_moetion.faults import IN_RECOVERY, PLACES
from tests.equivalence import (
    test_between,
    test_identity,
    test_node_loss,
    test_several,
    test_variants,
)
from tests.equivalence.harness import CUTS
from tests.equivalence.matrix import rows, unfired, unrecovered

KILL = "kill:global_rank=3,iteration=8,at=backward:1"
FAULT = "Fault(kind='kill', global_rank=3, iteration=8, place='backward', microbatch=1, copy=None)"


def told(*events: tuple[str, str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Events a millisecond apart."""
    return [
        {"who": who, "kind": kind, "monotonic_ns": n * 10**6, **fields}
        for n, (who, kind, fields) in enumerate(events)
    ]


ONE = (
    ("rank3", "fault", {"fault": FAULT}),
    ("agent-0", "detected", {"global_rank": 3}),
    ("agent-0", "planned", {}),
    ("agent-0", "detected", {"global_rank": 0}),
    ("agent-0", "gathered", {"committed": 7}),
    ("rank2", "restored", {"base": 4}),
    ("rank2", "replayed", {"iteration": 5}),
    ("rank3", "replayed", {"iteration": 5}),
)
ENDED = ("agent-0", "resumed", {})


def test_a_row_says_who_failed_where_and_what_it_was_recovered_from() -> None:
    (row,) = rows("run", "stage", 2, told(*ONE, ENDED))
    assert row.count == 2
    assert row.line() == (
        "stage  run after iteration 7: kill rank 3 (stage 1) at backward:1"
        " + rank 0 (stage 0) killed from outside while settling"
        " => frame 4 and 1 replayed iterations, 0.0 s"
    )


@pytest.mark.parametrize("kind", ["corrupt", "hold", "poison"])
def test_a_fault_that_ends_nobody_is_not_why_its_rank_died_later(kind: str) -> None:
    harmless = ("rank3", "fault", {"fault": FAULT.replace("kill", kind)})
    (row,) = rows("run", "stage", 2, told(harmless, *ONE[1:2], ENDED))
    assert row.points == "rank 3 (stage 1) killed from outside"


def test_a_recovery_that_does_not_end_is_no_row_and_is_named() -> None:
    events = told(*ONE, ENDED, *ONE)
    assert len(rows("run", "stage", 2, events)) == 1
    assert len(unrecovered(events)) == 2
    assert unrecovered(told(*ONE, ENDED)) == []


def test_a_fault_that_was_asked_for_and_did_not_fire_is_named() -> None:
    assert unfired(KILL, told(*ONE)) == []
    assert unfired(f"{KILL};{KILL}", told(*ONE)) == [FAULT, FAULT]
    assert unfired(KILL, []) == [FAULT]


def test_a_node_and_a_start_from_a_spill_are_named() -> None:
    lost = ("agent-0", "node-lost", {"node_rank": 1})
    (row,) = rows("run", "shard", 2, told(lost, ENDED))
    assert row.points == "node 1 lost"
    (row,) = rows("run", "shard", 2, told(("agent-0", "cold-start", {"iteration": 12}), ENDED))
    assert (row.points, row.by) == ("agents and workers, all at once", "spill of iteration 12")


def test_a_start_from_a_checkpoint_ends_when_training_is_steady_again() -> None:
    told_back = {"tier": "Megatron checkpoint", "iteration": 6, "committed": 9}
    back, again = ("agent-0", "fell-back", told_back), ("rank0", "steady", {"iteration": 10})
    (first, second) = rows("run", "stage", 2, told(*ONE[:2], back, again, again, *ONE, ENDED))
    assert first.by == "Megatron checkpoint of iteration 6"
    assert first.committed == 9
    assert first.count == 1
    assert second.by != first.by
    assert len(unrecovered(told(*ONE[:2], back))) == 1


def asked(cut: str) -> set[tuple[str, int]]:
    """{(place, stage)} of the kills that the long runs of PP2 ask for; each fires or is missed."""
    scripted, _ = test_several.scripted(cut)
    kills = [*test_identity.everywhere(), *scripted, *test_between.DEATHS]
    return {(place.partition(":")[0], rank // 2) for rank, _, place in kills}


@pytest.mark.parametrize("cut", CUTS)
def test_every_place_on_every_stage_is_asked_for_under_both_cuts(cut: str) -> None:
    wanted = set(product(PLACES, (0, 1)))
    if cut == "shard":
        # Nothing is replayed.
        wanted -= {("replay", 0), ("replay", 1)}
    assert wanted - asked(cut) == set()


def test_every_way_of_failing_together_is_asked_for() -> None:
    """One or both ranks of a stage, all but one, all; stages that are neighbours and not; nodes;
    whoever had just served their logs.
    """
    at_once = {first for first, *_ in test_several.MOMENTS.values()}
    assert {(2, 3), (0, 3), (1, 2, 3), (0, 1, 2, 3)} <= at_once
    assert test_variants.TOGETHER["four-stages"] == ((1, 2), (0, 2))
    # Node 2 is stages 2 and 3, which stage 1 serves; then stages 0 and 2 serve stage 1.
    assert test_node_loss.SEVERAL == {4: ([2], []), 5: ([], [1]), 8: ([1], []), 9: ([], [0, 2])}
    # And behind that stage 1 is lost in the middle of serving stage 2.
    assert max(test_node_loss.SEVERAL) < test_node_loss.SERVED


@pytest.mark.parametrize("cut", CUTS)
def test_second_and_third_failures_are_asked_for_in_each_phase(cut: str) -> None:
    told = test_several.RECOVERIES + (test_several.REPLAYS if cut == "stage" else ())
    second = {place.partition(":")[0] for _, *others in told for _, place in others}
    assert second == set(IN_RECOVERY) - ({"replay"} if cut == "shard" else set())
    assert max(len(others) for _, *others in told) == 2
