"""Which tier is tried next, and how often within how long."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.agent.escalation import NOTHING_TRIED, Tier, Tried, after_failure
from megatron_moetion.config import RestartBudget

BUDGET = RestartBudget(3, 60.0)


def tiers(times: list[float], budget: RestartBudget = BUDGET) -> tuple[list[Tier | None], Tried]:
    tried, found = NOTHING_TRIED, []
    for now in times:
        tried, tier = after_failure(tried, now, budget)
        found.append(tier)
    return found, tried


def test_failures_within_the_budget_are_recovered_from_for_ever() -> None:
    found, tried = tiers([20.5 * n for n in range(1000)])
    assert set(found) == {Tier.LOCALIZED}
    # What is longer ago is not kept.
    assert len(tried.recoveries) == BUDGET.num


def test_past_the_budget_each_tier_is_tried_once_and_has_a_budget_of_its_own() -> None:
    found, tried = tiers([float(n) for n in range(8)])
    local = [Tier.LOCALIZED] * 3
    assert found == [*local, Tier.MEMORY, *local, Tier.SPILL]
    assert str(tried) == "6 localized recoveries, memory restart"
    # That there was a spill or a checkpoint, the leader says.
    for at, step, following in ((8.0, Tier.SPILL, Tier.CHECKPOINT), (10.0, Tier.CHECKPOINT, None)):
        tried = tried.with_step(step, at)
        for _ in range(BUDGET.num):
            tried, tier = after_failure(tried, at + 1.0, BUDGET)
            assert tier is Tier.LOCALIZED
        tried, tier = after_failure(tried, at + 1.0, BUDGET)
        assert tier is following
    assert str(tried) == "12 localized recoveries, memory restart, spill, Megatron checkpoint"


def test_after_a_quiet_time_the_first_tier_is_tried_again() -> None:
    found, _ = tiers([0.0, 1.0, 2.0, 3.0, 64.0, 65.0, 66.0, 67.0])
    local = [Tier.LOCALIZED] * 3
    assert found == [*local, Tier.MEMORY, *local, Tier.MEMORY]


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=60), st.integers(1, 5))
def test_no_tier_below_is_tried_twice_within_the_time_of_the_budget(
    gaps: list[float], num: int
) -> None:
    budget, now, tried, steps = RestartBudget(num, 30.0), 0.0, NOTHING_TRIED, []
    for gap in gaps:
        now += gap
        tried, tier = after_failure(tried, now, budget)
        if tier is None:
            break
        if tier in (Tier.SPILL, Tier.CHECKPOINT):
            tried = tried.with_step(tier, now)
        if tier is not Tier.LOCALIZED:
            steps.append((tier, now))
    for tier in (Tier.MEMORY, Tier.SPILL, Tier.CHECKPOINT):
        times = [at for step, at in steps if step is tier]
        assert all(b - a > 30.0 for a, b in pairwise(times))


@pytest.mark.parametrize(
    ("tried", "text"),
    [
        (NOTHING_TRIED, "no tier"),
        (Tried((1.0,)), "1 localized recovery"),
        (Tried((1.0, 2.0), ((Tier.SPILL, 3.0),)), "2 localized recoveries, spill"),
        (Tried((), ((Tier.MEMORY, 3.0),)), "memory restart"),
        (
            Tried((), ((Tier.SPILL, 3.0), (Tier.MEMORY, 4.0), (Tier.SPILL, 5.0))),
            "memory restart, 2 spills",
        ),
        (Tried((), ((Tier.CHECKPOINT, 3.0), (Tier.CHECKPOINT, 4.0))), "2 Megatron checkpoints"),
    ],
)
def test_it_is_said_in_words_and_survives_a_new_beginning(tried: Tried, text: str) -> None:
    assert str(tried) == text
    assert Tried.from_json(json.loads(json.dumps(tried.to_json()))) == tried
