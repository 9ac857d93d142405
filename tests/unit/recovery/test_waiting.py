"""A wait ends when its call does, or when it is called off; the call may go on alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_moetion.recovery.failure import Interrupted, is_communication_error
from megatron_moetion.recovery.waiting import Wait, Waits


class Blocked:
    """A call that tells when it has begun, and returns when it is let go."""

    def __init__(self) -> None:
        self.begun, self.let_go = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        self.let_go.wait()
        return "done"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def test_results_and_errors_are_those_of_the_call() -> None:
    waits = Waits()
    assert waits.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        waits.run(lambda: 1 // 0)
    assert waits.run(lambda: 8) == 8
    assert waits.all_ended()


def test_whoever_wants_to_know_is_told_how_many_wait(pool: ThreadPoolExecutor) -> None:
    waits, told = Waits(), []
    waits.on_change = told.append
    waits.run(lambda: waits.run(lambda: 7))
    with pytest.raises(ZeroDivisionError):
        waits.run(lambda: 1 // 0)
    assert told == [1, 2, 1, 0, 1, 0]
    blocked = Blocked()
    waiting = pool.submit(waits.run, blocked)
    blocked.begun.wait()
    waits.call_off(1, Wait.INSIDE)
    # One that is left alone waits no more.
    assert isinstance(waiting.exception(timeout=30), Interrupted)
    assert told[-2:] == [1, 0]
    blocked.let_go.set()


def test_a_wait_is_called_off_and_its_call_left_alone(pool: ThreadPoolExecutor) -> None:
    waits, blocked = Waits(), Blocked()
    waiting = pool.submit(waits.run, blocked)
    blocked.begun.wait()
    waits.call_off(1, Wait.INSIDE)
    error = waiting.exception(timeout=30)
    assert isinstance(error, Interrupted)
    assert is_communication_error(error)
    assert not waits.all_ended()
    # Nothing that is waited for on the same groups can end well.
    with pytest.raises(Interrupted):
        waits.run(lambda: 7)
    waits.renew(1)
    assert waits.run(lambda: 7) == 7
    blocked.let_go.set()
    waits.settle()
    while not waits.all_ended():
        pass


def test_a_call_that_ends_as_it_is_called_off_counts_once(pool: ThreadPoolExecutor) -> None:
    waits = Waits()
    for epoch in range(1, 200):
        blocked = Blocked()
        waiting = pool.submit(waits.run, blocked)
        blocked.begun.wait()
        off = pool.submit(waits.call_off, epoch, *Wait)
        blocked.let_go.set()
        off.result()
        outcome = waiting.exception(timeout=30) or waiting.result()
        assert outcome == "done" or isinstance(outcome, Interrupted)
        waits.renew(epoch)
        assert waits.run(lambda: 7) == 7


def test_only_the_kinds_that_were_named_are_called_off(pool: ThreadPoolExecutor) -> None:
    waits, inside, crossing = Waits(), Blocked(), Blocked()

    def cross() -> str:
        with waits.of(Wait.CROSSING):
            return waits.run(crossing)

    calls = [pool.submit(waits.run, inside), pool.submit(cross)]
    inside.begun.wait()
    crossing.begun.wait()
    waits.call_off(1, Wait.CROSSING)
    assert isinstance(calls[1].exception(timeout=30), Interrupted)
    assert not calls[0].done()
    inside.let_go.set()
    crossing.let_go.set()
    assert calls[0].result(timeout=30) == "done"


def test_what_was_called_off_for_an_earlier_failure_does_not_touch_new_groups() -> None:
    waits = Waits()
    waits.renew(3)
    waits.call_off(3, *Wait)
    assert waits.run(lambda: 7) == 7
    waits.call_off(2, *Wait)
    assert waits.run(lambda: 7) == 7
    waits.call_off(4, *Wait)
    with pytest.raises(Interrupted):
        waits.run(lambda: 7)
