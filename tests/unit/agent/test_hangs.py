"""The limit from a history of step times, and who hangs from what is seen of all ranks."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.agent.hangs import (
    MUCH,
    OUTLIERS_OF_STEPS,
    SHORTEST_OF_TIMEOUT,
    Limit,
    Observation,
    here,
    judge,
    limit_of,
    trains,
    usual_pause,
    usual_step,
)
from megatron_moetion.progress import EVALUATION, PLACES, SAVING, SET_UP

TIMEOUT = timedelta(seconds=600)
seconds = st.floats(1e-3, 1e3)
steps = st.lists(seconds, min_size=1, max_size=64)
observations = st.builds(
    Observation,
    global_rank=st.integers(0, 7),
    pid=st.integers(1, 99),
    seconds=seconds,
    iteration=st.integers(1, 3),
    ordinal=st.integers(0, 20),
    place=st.sampled_from(PLACES),
    waiting=st.booleans(),
    state=st.sampled_from("RSDTt"),
    answers=st.sampled_from([None, True, False]),
    step=st.none() | seconds,
)
jobs = st.lists(observations, min_size=1, max_size=8, unique_by=lambda each: each.global_rank)


def rank(global_rank: int, **fields: object) -> Observation:
    usual = Observation(global_rank, 1, 5.0, 3, 4, "forward:1", True, "S", True, 0.5)
    return replace(usual, **fields)


@given(steps, st.randoms())
def test_a_usual_step_is_one_that_was_seen_whatever_their_order(history: list[float], mix) -> None:
    usual = usual_step(history)
    assert usual in history
    mixed = history[:]
    mix.shuffle(mixed)
    assert usual_step(mixed) == usual
    assert sum(step > usual for step in history) <= len(history) // OUTLIERS_OF_STEPS


@given(steps, st.integers(0, 63), st.floats(1, 10))
def test_a_usual_step_never_falls_when_one_takes_longer(
    history: list[float], which: int, times: float
) -> None:
    longer = history[:]
    longer[which % len(history)] *= times
    assert usual_step(longer) >= usual_step(history)
    assert usual_step([2 * step for step in history]) == 2 * usual_step(history)


def test_a_single_long_step_among_many_is_no_usual_one_but_those_that_come_again_are() -> None:
    history = [1.0] * 32
    assert usual_step([*history[1:], 50.0]) == 1.0
    # One in eight.
    assert usual_step([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0] * 8) == 3.0
    assert usual_step([]) is None


@given(jobs, st.floats(2, 100))
def test_a_limit_is_a_multiple_of_the_slowest_usual_step_and_never_too_short(
    job: list[Observation], factor: float
) -> None:
    limit = limit_of(job, factor, TIMEOUT, steady=True)
    known = [each.step for each in job if each.step is not None]
    if not known:
        assert (limit.seconds, limit.step) == (600.0, None)
    else:
        assert limit.seconds >= factor * max(known)
        assert limit.seconds >= 600 / SHORTEST_OF_TIMEOUT
        assert limit.seconds in (factor * max(known), 600 / SHORTEST_OF_TIMEOUT)


@given(jobs, st.floats(0.01, 1000), st.sampled_from([EVALUATION, f"{SAVING}:1"]))
def test_in_evaluation_and_saving_the_limit_is_a_multiple_of_the_longest_pause_in_earlier_ones(
    job: list[Observation], longest: float, place: str
) -> None:
    pauses = [replace(each, place=place, pause=0.01) for each in job[1:]]
    pauses.append(replace(job[0], place=place, pause=longest))
    limit = here(Limit(1000.0, 100.0, 10), pauses, TIMEOUT)
    assert limit.seconds == min(max(10 * longest, 600 / SHORTEST_OF_TIMEOUT), 600)
    if limit.step is not None:
        assert "pauses seen here" in str(limit)


def test_a_pause_is_usual_once_it_was_seen_twice() -> None:
    assert usual_pause([5.0]) is None
    assert usual_pause([5.0, 1.0]) == 5.0


@given(jobs)
def test_before_steps_are_known_and_in_unknown_evaluation_and_saving_the_timeout_is_the_limit(
    job: list[Observation],
) -> None:
    assert limit_of(job, 10, TIMEOUT, steady=False).seconds == 600
    learned = Limit(50.0, 5.0, 10)
    for place in (EVALUATION, SAVING):
        aside = [replace(job[0], place=place), *job[1:]]
        assert here(learned, aside, TIMEOUT).seconds == 600
    pauses = [replace(each, place=f"{EVALUATION}:3", pause=1.0) for each in job]
    newcomer = replace(job[0], global_rank=99, place=EVALUATION, pause=None)
    assert here(learned, [*pauses, newcomer], TIMEOUT).seconds == 600
    assert here(Limit(600.0, None, 10), pauses, TIMEOUT).seconds == 600
    trains = [replace(each, place="forward:1") for each in job]
    assert here(learned, trains, TIMEOUT) == learned


def test_a_limit_says_what_it_was_learned_from() -> None:
    learned = limit_of([rank(0, step=5.0)], 10, TIMEOUT, steady=True)
    assert str(learned) == "limit 50 s, learned from 10 iterations of 5 s"
    least = limit_of([rank(0, step=0.5)], 10, TIMEOUT, steady=True)
    assert str(least) == (
        "limit 30 s, a 20th of --moetion-timeout, as 10 iterations of 0.5 s are less"
    )
    unknown = limit_of([rank(0)], 10, TIMEOUT, steady=False)
    assert str(unknown) == "limit 600 s, --moetion-timeout, as nothing is learned here"


@given(seconds, seconds)
def test_a_limit_is_told_again_when_it_has_doubled_or_halved(old: float, new: float) -> None:
    before, now = Limit(old, 1.0, 10), Limit(new, 1.0, 10)
    assert now.differs_much(before) == before.differs_much(now)
    assert now.differs_much(before) == (max(old, new) >= MUCH * min(old, new))
    assert now.differs_much(None)
    assert now.differs_much(Limit(old, None, 10))


@given(jobs, st.permutations(range(8)))
def test_somebody_is_always_chosen_and_the_same_whoever_answered_first(
    job: list[Observation], order: list[int]
) -> None:
    verdict = judge(job, 5.0)
    assert verdict.culprits
    assert set(verdict.culprits) <= set(job)
    shuffled = [job[n] for n in order if n < len(job)]
    assert judge(shuffled, 5.0) == verdict


@given(jobs)
def test_not_all_are_killed_unless_something_is_wrong_with_each(job: list[Observation]) -> None:
    verdict = judge(job, 5.0)
    if len(verdict.culprits) == len(job) > 1:
        assert all(c.state in "Tt" or c.answers is False for c in job)
    if not verdict.told:
        assert len(verdict.culprits) == 1


@given(jobs)
def test_a_stopped_rank_is_a_culprit_and_nobody_who_runs_is_beside_it(
    job: list[Observation],
) -> None:
    stopped = {each.global_rank for each in job if each.state in "Tt"}
    if stopped:
        assert {c.global_rank for c in judge(job, 5.0).culprits} == stopped


@given(jobs)
def test_who_waits_for_peers_and_answers_is_not_chosen_while_somebody_does_not_wait(
    job: list[Observation],
) -> None:
    job = [replace(each, state="S") for each in job]
    if len({each.waiting for each in job}) == 2:
        verdict = judge(job, 5.0)
        assert verdict.told
        assert not any(c.waiting for c in verdict.culprits)


@pytest.mark.parametrize(
    ("odd", "how"),
    [
        (rank(1, state="T"), "stopped by a signal"),
        (rank(1, state="t"), "stopped by a debugger"),
        (rank(1, waiting=False, answers=False), "its listener does not answer: it holds the GIL"),
        (rank(1, waiting=False), "not waiting for peers"),
        (rank(1, waiting=False, state="D"), "in a system call that cannot be interrupted"),
        (rank(1, answers=False), "its listener does not answer: it holds the GIL"),
    ],
)
def test_the_odd_one_out_is_named(odd: Observation, how: str) -> None:
    verdict = judge([rank(0), odd, rank(2)], 5.0)
    assert verdict.told
    assert verdict.culprits == (odd,)
    assert how in odd.how
    assert f"global rank 1 in iteration 3 at forward:1, 5.0 s ago ({odd.how}" in odd.line


def test_where_all_wait_for_each_other_it_is_who_has_come_least_far() -> None:
    verdict = judge([rank(2), rank(1, ordinal=3), rank(0), rank(3, ordinal=3)], 5.0)
    assert not verdict.told
    assert [c.global_rank for c in verdict.culprits] == [1]
    # As on a GPU, where nobody is seen to wait.
    verdict = judge([rank(r, waiting=False, iteration=4 - r) for r in range(3)], 5.0)
    assert (verdict.told, verdict.culprits[0].global_rank) == (False, 2)


def test_a_job_trains_once_all_have_begun_to() -> None:
    assert trains([rank(0), rank(1)])
    assert not trains([rank(0), rank(1, place=SET_UP)])
    assert not trains([rank(0), rank(1, pid=0)])


def test_an_observation_travels() -> None:
    assert Observation(**rank(3).to_json()) == rank(3)
