"""The page that a worker writes and its agent reads."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion import faults
from megatron_moetion.progress import (
    EVALUATION,
    FEWEST,
    KEPT,
    KEPT_PAUSES,
    PAGE_BYTES,
    PLACES,
    SAVING,
    SET_UP,
    UNLIKE_OTHERS,
    Page,
    Progress,
)


@pytest.mark.parametrize("place", PLACES)
def test_what_a_worker_writes_its_agent_reads(place: str) -> None:
    page = Page()
    progress = Progress(page.path)
    assert page.read().place == SET_UP
    before = time.monotonic_ns()
    progress.at(place, 7)
    progress.at(place, 7, 3)
    seen = page.read()
    assert (seen.iteration, seen.place, seen.ordinal) == (7, f"{place}:3", 2)
    assert before <= seen.stamp_ns <= time.monotonic_ns()
    progress.at(place, 8)
    assert page.read().place == place
    page.close()


def test_every_place_of_a_fault_can_be_seen() -> None:
    assert set(faults.PLACES) < set(PLACES)


def test_a_wait_that_begins_or_ends_is_progress() -> None:
    page = Page()
    progress = Progress(page.path)
    stamps = [page.read().stamp_ns]
    for calls, waiting in [(1, True), (2, True), (1, True), (0, False)]:
        progress.waits(calls)
        assert page.read().waiting == waiting
        stamps.append(page.read().stamp_ns)
    assert stamps == sorted(set(stamps))


def test_each_process_has_a_page_of_its_own_that_outlives_neither_side() -> None:
    page = Page()
    progress = Progress(page.path)
    page.close()
    # Whoever has it mapped may go on writing.
    progress.at("end", 1)
    assert not os.path.exists(page.path)


@given(st.integers(0, 3 * KEPT))
def test_only_iterations_that_are_like_the_next_one_are_timed(number: int) -> None:
    page = Page()
    progress = Progress(page.path)
    told = [progress.begin(iteration) for iteration in range(5, 5 + number + 1)]
    assert len(page.read().steps) == min(max(number - UNLIKE_OTHERS, 0), KEPT)
    enough = UNLIKE_OTHERS + FEWEST
    assert told == [n == enough for n in range(number + 1)]
    # What was known stays known, but whether it still holds is seen again.
    progress.recovers()
    told = [progress.begin(iteration) for iteration in range(100, 100 + enough + 1)]
    assert told == [False] * enough + [True]
    page.close()


def test_an_iteration_with_an_evaluation_behind_it_or_that_is_run_again_is_not_timed() -> None:
    page = Page()
    progress = Progress(page.path)
    for iteration in range(UNLIKE_OTHERS + 1):
        progress.begin(iteration)
    progress.at("end", UNLIKE_OTHERS)
    with progress.aside(EVALUATION):
        assert page.read().place == EVALUATION
    assert page.read().place == "end"
    progress.begin(UNLIKE_OTHERS + 1)
    progress.begin(UNLIKE_OTHERS + 1)
    assert page.read().steps == ()
    progress.begin(UNLIKE_OTHERS + 2)
    assert len(page.read().steps) == 1
    page.close()


def test_the_longest_pause_of_each_evaluation_and_saving_is_kept_unless_a_recovery_is_in_it() -> (
    None
):
    page = Page()
    progress = Progress(page.path)

    def aside(place: str) -> tuple[float, ...]:
        with progress.aside(place):
            return page.read().pauses

    assert aside(EVALUATION) == ()
    with progress.aside(EVALUATION):
        began = time.monotonic_ns()
        while time.monotonic_ns() - began < 20_000_000:
            pass
        progress.at("forward", 3, 1)
        # Elsewhere nothing of that is told.
        assert page.read().pauses == ()
        progress.at(EVALUATION, 3, 1)
        first, *_ = page.read().pauses
    one, two = aside(EVALUATION)
    assert (one, two >= 0.02) == (first, True)
    assert aside(SAVING) == ()
    with progress.aside(SAVING):
        progress.recovers()
    with pytest.raises(RuntimeError), progress.aside(SAVING):
        raise RuntimeError
    # But for the first one, which was over before it could be told of.
    assert len(aside(SAVING)) == 1
    for _ in range(2 * KEPT_PAUSES):
        aside(EVALUATION)
    assert len(aside(EVALUATION)) == KEPT_PAUSES
    assert len(page.read().steps) == 0
    page.close()


def test_a_worker_without_an_agent_writes_for_nobody() -> None:
    progress = Progress()
    progress.at("end", 1)
    assert PAGE_BYTES >= 8 * (8 + KEPT + 2 * (1 + KEPT_PAUSES))


def test_saying_where_one_is_costs_next_to_nothing() -> None:
    page = Page()
    progress = Progress(page.path)
    number = 10_000
    began = time.perf_counter()
    for ordinal in range(number):
        progress.at("forward", 1, ordinal)
        progress.waits(1)
        progress.waits(0)
    each = (time.perf_counter() - began) / number
    print(f"a place and a wait: {each * 1e9:.0f} ns")
    assert each < 1e-4
    page.close()
