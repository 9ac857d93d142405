"""When the leader looks, and that it raises an alarm in time and never without cause."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.agent.hangs import Observation
from megatron_moetion.agent.vigil import (
    PART,
    Alarm,
    Deaf,
    Inquired,
    Learned,
    Look,
    Outcome,
    Stubborn,
    Vigil,
)

RANKS = (0, 1, 2, 3)
TIMEOUT = timedelta(seconds=600)
SHORTEST = 30.0


class Job:
    """Ranks on two nodes, that make progress when the script says so, and time that passes.

    Args:
        factor: of the limit.
        step: of each rank.
    """

    def __init__(self, factor: float = 10.0, step: float | None = 5.0) -> None:
        self.now = 0.0
        self.vigil = Vigil(RANKS, 2, factor, TIMEOUT, self.now)
        self.step = step
        self.progress = dict.fromkeys(RANKS, 0.0)
        self.odd: dict[int, dict[str, object]] = {}
        self.looks: list[tuple[float, Look]] = []
        self.said: list[tuple[float, Outcome]] = []
        self.deaf: set[int] = set()

    def see(self, node_rank: int, pings: bool) -> list[Observation]:
        return [
            Observation(
                **{
                    "global_rank": rank,
                    "pid": 10 + rank,
                    "seconds": self.now - self.progress[rank],
                    "iteration": 3,
                    "ordinal": 2,
                    "place": "forward:1",
                    "waiting": True,
                    "state": "S",
                    "answers": True if pings else None,
                    "step": self.step,
                    **self.odd.get(rank, {}),
                }
            )
            for rank in RANKS
            if rank // 2 == node_rank
        ]

    def take(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self.said.append((self.now, outcome))
            if isinstance(outcome, Look):
                self.looks.append((self.now, outcome))
                for node in {0, 1} - self.deaf:
                    seen = self.see(node, outcome.ping_seconds > 0)
                    self.take(self.vigil.looked(node, outcome.number, seen, self.now))

    def steady(self) -> None:
        for rank in RANKS:
            self.take(self.vigil.steady(rank, self.now))

    def until(self, end: float) -> None:
        """Time passes, as long as no alarm is raised."""
        while self.vigil.deadline is not None and self.vigil.deadline <= end:
            self.now = max(self.now, self.vigil.deadline)
            self.take(self.vigil.tick(self.now))
            if self.of(Alarm):
                return
        self.now = end

    def of(self, kind: type) -> list[Outcome]:
        return [outcome for _, outcome in self.said if isinstance(outcome, kind)]


@settings(max_examples=200)
@given(st.lists(st.floats(0.1, 200), min_size=1, max_size=30), st.floats(0.1, 20))
def test_there_is_an_alarm_if_and_only_if_nobody_made_progress_for_the_limit(
    gaps: list[float], step: float
) -> None:
    job = Job(step=step)
    job.steady()
    limit = max(10 * step, SHORTEST)
    for n, gap in enumerate(gaps):
        last = max(job.progress.values())
        job.until(last + gap)
        if job.of(Alarm):
            assert gap >= limit
            assert job.now == pytest.approx(last + limit)
            return
        assert gap <= limit * (1 + 1e-9)
        job.progress[n % 4] = job.now
    # It is looked at once in a limit, and once more when it is steady.
    assert len(job.looks) <= job.now / limit + len(gaps) + 1


def test_a_job_that_trains_is_looked_at_once_in_the_limit() -> None:
    job = Job()
    job.steady()
    del job.looks[:]
    for second in range(1, 1001):
        job.until(float(second))
        job.progress = dict.fromkeys(RANKS, job.now)
    # 50 s, and what the job has done in the last second is not seen again.
    assert 1000 / 51 <= len(job.looks) <= 1000 / 49


def test_the_alarm_comes_after_pings_and_names_who_is_odd() -> None:
    job = Job()
    job.steady()
    job.odd = {2: {"waiting": False, "answers": False}}
    job.until(1e6)
    (alarm,) = job.of(Alarm)
    assert isinstance(alarm, Alarm)
    assert [c.global_rank for c in alarm.verdict.culprits] == [2]
    assert len(alarm.seen) == 4
    assert (job.now, alarm.limit.seconds, alarm.verdict.seconds) == (50.0, 50.0, 50.0)
    assert job.looks[-1][1].ping_seconds == 50.0 / PART


def test_before_all_ranks_are_steady_the_timeout_is_the_limit_and_says_nothing() -> None:
    job = Job()
    for rank in RANKS[1:]:
        job.take(job.vigil.steady(rank, job.now))
    job.until(599.0)
    assert job.said == []
    job.until(1e6)
    assert job.now == 600.0
    assert len(job.of(Alarm)) == 1
    assert job.of(Learned) == []


def test_a_job_that_is_being_set_up_is_left_alone() -> None:
    job = Job()
    job.odd = {0: {"place": "set-up"}}
    job.until(10_000.0)
    assert job.of(Alarm) == []
    assert 10 <= len(job.looks) <= 17


def test_the_limit_is_told_once_and_again_when_it_has_changed_much() -> None:
    job = Job()
    job.steady()
    for step in (5.0, 9.0, 10.0, 6.0, 5.0):
        job.step = step
        job.progress = dict.fromkeys(RANKS, job.now)
        job.until(job.now + 60)
        job.progress = dict.fromkeys(RANKS, job.now)
    assert [told.limit.seconds for told in job.of(Learned)] == [50.0, 100.0, 50.0]


def test_an_evaluation_may_take_the_timeout_and_a_hang_behind_it_is_seen_in_time() -> None:
    job = Job()
    job.steady()
    job.odd = {3: {"place": "evaluate:1"}}
    job.until(590.0)
    assert job.of(Alarm) == []
    job.odd, job.progress = {}, dict.fromkeys(RANKS, job.now)
    job.until(1e6)
    (alarm,) = job.of(Alarm)
    assert (job.now, alarm.limit.seconds) == (640.0, 50.0)
    job = Job()
    job.steady()
    job.odd = {3: {"place": "evaluate:1"}}
    job.until(1e6)
    assert (job.now, len(job.of(Alarm))) == (600.0, 1)


def test_once_a_rank_has_finished_nobody_is_watched_any_more() -> None:
    job = Job()
    job.steady()
    job.vigil.ends()
    job.until(10_000.0)
    job.vigil.trains(job.now)
    assert job.vigil.deadline is None
    assert job.of(Alarm) == []


def test_the_rule_is_said_before_anything_is_learned() -> None:
    assert Job().vigil.rule == (
        "after 10 iterations without progress (--moetion-hang-factor), though not before 30 s;"
        " before their time is known, and in the first 2 evaluations and savings, after 600 s"
        " (--moetion-timeout)"
    )
    assert "in a recovery only, after 600 s" in Job(factor=0).vigil.rule


def test_with_factor_zero_nobody_is_looked_at_but_who_is_inquired_about() -> None:
    job = Job(factor=0)
    job.steady()
    job.until(10_000.0)
    assert job.vigil.deadline is None
    assert job.looks == []
    job.odd = {1: {"state": "T"}, 3: {"waiting": False}}
    job.take(job.vigil.inquire([0, 3], job.now))
    (told,) = job.of(Inquired)
    assert isinstance(told, Inquired)
    assert [c.global_rank for c in told.culprits] == [3]
    job.take(job.vigil.inquire([0, 2], job.now))
    # Who cannot be told from the others.
    assert [c.global_rank for c in job.of(Inquired)[1].culprits] == [0, 2]


def test_a_recovery_is_not_watched_and_afterwards_it_is_learned_anew() -> None:
    job = Job()
    job.steady()
    job.vigil.pauses()
    job.until(1000.0)
    assert job.of(Alarm) == []
    job.vigil.trains(job.now)
    job.until(1599.0)
    assert job.of(Alarm) == []
    job.until(1601.0)
    assert (job.now, len(job.of(Alarm))) == (1600.0, 1)


def test_an_agent_that_was_held_up_itself_excuses_its_workers() -> None:
    job = Job()
    job.steady()
    # All processes of the node stood still for an hour.
    job.now = 3600.0
    job.take(job.vigil.tick(job.now))
    assert len(job.looks) == 1
    job.until(3649.0)
    assert job.of(Alarm) == []
    job.until(3651.0)
    assert (job.now, len(job.of(Alarm))) == (3650.0, 1)


def test_what_moves_while_it_is_pinged_is_no_hang() -> None:
    job = Job()
    job.steady()
    job.now = 50.0
    (look,) = job.vigil.tick(job.now)
    assert isinstance(look, Look)
    (pings,) = [
        outcome
        for node in (0, 1)
        for outcome in job.vigil.looked(node, look.number, job.see(node, False), job.now)
    ]
    assert isinstance(pings, Look)
    job.now = 55.0
    job.progress[3] = 54.0
    for node in (0, 1):
        assert job.vigil.looked(node, pings.number, job.see(node, True), job.now) == []
    assert job.vigil.deadline == pytest.approx(104.0)


def test_an_agent_that_says_nothing_is_told_of_and_nobody_is_killed_on_a_guess() -> None:
    job = Job()
    job.steady()
    job.deaf = {1}
    job.until(500.0)
    assert job.of(Alarm) == []
    assert job.of(Deaf)[0] == Deaf((1,))
    # But whoever is stopped here is.
    job.odd = {1: {"state": "T"}}
    job.until(2000.0)
    (alarm,) = job.of(Alarm)
    assert isinstance(alarm, Alarm)
    assert [c.global_rank for c in alarm.verdict.culprits] == [1]


def test_who_is_still_there_after_it_was_killed_ends_the_job() -> None:
    job = Job()
    job.steady()
    job.odd = {1: {"state": "D", "waiting": False}}
    job.until(1e6)
    assert len(job.of(Alarm)) == 1
    while not job.of(Stubborn):
        assert job.vigil.deadline is not None
        job.now = job.vigil.deadline
        job.take(job.vigil.tick(job.now))
    assert job.now == 100.0
    assert len(job.of(Alarm)) == 1
