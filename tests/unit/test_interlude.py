"""An interlude is done again until every rank is through, with the data of its first attempt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.inbox.key import InterludeKey
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.inbox.tap import Cursor, Mode
from megatron_moetion.interlude import Interlude, Interludes, over
from megatron_moetion.recovery.failure import Interrupted
from megatron_moetion.recovery.plan import NothingToRebuildFrom, Position
from megatron_moetion.recovery.waiting import Waits
from megatron_moetion.vault import LocalVault

PAIRS = st.tuples(st.integers(1, 3), st.integers(0, 2))


@given(st.lists(PAIRS, min_size=1, max_size=4), PAIRS)
def test_it_is_over_when_nobody_has_it_before_him(
    ended: list[tuple[int, int]], place: tuple[int, int]
) -> None:
    lacking = [e for e in ended if e[0] < place[0] or (e[0] == place[0] and e[1] <= place[1])]
    assert over([Position(ended=e) for e in ended], *place) == (not lacking)


def test_without_a_recovery_nothing_is_over() -> None:
    assert not over((), 3, 0)


@given(PAIRS, PAIRS)
def test_how_far_a_rank_was_survives_the_way_to_its_replacement(
    ended: tuple[int, int], told: tuple[int, int]
) -> None:
    position = Position(7, committed=7, logged=6, ended=ended, told=told)
    assert Position.from_json(position.to_json()) == position


class OneHost:
    """A host whose state is two numbers."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.state = {"seed": 1, "consumed": 0}
        self.resets = 0

    def interlude_state(self) -> dict[str, int]:
        return dict(self.state)

    def load_interlude_state(self, state: dict[str, int]) -> None:
        self.state = dict(state)

    start_state, take_over = interlude_state, load_interlude_state

    def reset_after_abort(self) -> None:
        self.resets += 1


class OneGate:
    """A session with two ranks: this one, and a peer that is as far as it is told."""

    def __init__(self, peer: tuple[int, int] = (0, 0)) -> None:
        self.position = Position(4, committed=4)
        self.peer, self.found = Position(ended=peer), ()  # type: tuple[Any, Any]
        self.frozen = False
        self.paused: list[Exception] = []
        self.places: list[tuple[str, int | None]] = []
        self.lost: list[str] = []

    def positions(self) -> Any:
        return self.found

    def pause(self, error: Exception) -> None:
        self.paused.append(error)
        self.found, self.frozen = (self.position, self.peer), False

    def ended(self, iteration: int, count: int) -> None:
        if self.frozen:
            raise Interrupted("before it was over")
        self.position = Position(4, committed=4, ended=(iteration, count))

    def told(self, iteration: int, count: int) -> None:
        self.position = Position(4, committed=4, ended=self.position.ended, told=(iteration, count))

    def reached(self, place: str, microbatch: int | None = None) -> None:
        self.places.append((place, microbatch))

    def aside(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def hopeless(self, reason: str) -> None:
        self.lost.append(reason)


class Rank:
    """One rank's interludes after iteration 4."""

    def __init__(self, gate: OneGate, log: InboxLog | None = None) -> None:
        self.host, self.gate = OneHost(), gate
        self.log = InboxLog(LocalVault(0), 0) if log is None else log
        self.cursor = Cursor(mode=Mode.LIVE, iteration=4)
        host: Any = self.host
        self.interludes = Interludes(self.cursor, self.log, host, Waits(), gate)
        self.data: Iterator[int] = iter(range(100))
        self.said: list[str] = []
        self.seen: list[list[int]] = []

    def evaluate(self, *lost_at: int, then: Callable[[], None] = lambda: None) -> None:
        """Draws three batches; a peer is lost before that of these numbers, one an attempt."""
        left = list(lost_at)

        def run(say: Callable[[str], None]) -> None:
            assert self.cursor.mode is Mode.OFF
            self.seen.append([])
            for number in range(3):
                self.interludes.count("evaluate")
                if left and left[0] == number:
                    raise Interrupted(f"a peer was lost at {left.pop(0)}")
                self.host.state["consumed"] += 1
                self.host.state["seed"] *= 3
                batch = self.interludes.draw(self.data, lambda: [next(self.data)])
                self.seen[-1].append(batch[0])
                # As a host may do with what is its own.
                batch[0] = -1
            say(f"loss {sum(self.seen[-1])}")
            then()

        skip: Callable[[Any], object] = next
        told = Interlude("evaluate", run, self.said.append, [self.data], skip)
        self.interludes.run(told)
        assert self.cursor.mode is Mode.LIVE
        assert not self.interludes.inside


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A world of one rank: a barrier returns at once."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_an_attempt_sees_the_batches_of_the_one_before_and_the_state_before_it() -> None:
    rank = Rank(OneGate())
    rank.evaluate(2, 0, 1)
    assert rank.seen == [[0, 1], [], [0], [0, 1, 2]]
    assert rank.host.state == {"seed": 27, "consumed": 3}
    assert rank.said == ["loss 3"]
    assert (len(rank.gate.paused), rank.host.resets) == (3, 3)
    assert next(rank.data) == 3
    # Faults are counted anew in each attempt.
    expected = [*range(3), 0, *range(2), *range(3)]
    assert [n for place, n in rank.gate.places if place == "evaluate"] == expected
    rank.evaluate()
    assert rank.gate.position.ended == rank.gate.position.told == (4, 2)


def test_who_is_told_of_a_lost_peer_before_it_is_through_does_it_again() -> None:
    rank = Rank(OneGate())

    def freeze() -> None:
        rank.gate.frozen = not rank.gate.paused

    rank.evaluate(then=freeze)
    assert rank.seen == [[0, 1, 2], [0, 1, 2]]
    assert rank.said == ["loss 3"]


def test_when_all_were_through_nobody_does_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(OneGate(peer=(4, 1)))
    barrier, met = dist.barrier, []

    def lost(*args: Any, **kwargs: Any) -> Any:
        met.append(1)
        if len(met) == 1:
            raise Interrupted("a peer was lost while the others were waited for")
        return barrier(*args, **kwargs)

    monkeypatch.setattr(dist, "barrier", lost)
    rank.evaluate()
    assert (rank.seen, rank.said) == ([[0, 1, 2]], ["loss 3"])
    assert rank.host.state == {"seed": 27, "consumed": 3}
    assert next(rank.data) == 3
    # The same failure with a peer that was not through.
    met.clear()
    rank = Rank(OneGate(peer=(4, 0)))
    rank.evaluate()
    assert (rank.seen, rank.said) == ([[0, 1, 2], [0, 1, 2]], ["loss 3"])


@pytest.mark.parametrize("told", [(4, 0), (4, 1)])
def test_a_replacement_of_one_that_was_through_takes_over_how_it_ended(
    told: tuple[int, int],
) -> None:
    first = Rank(OneGate())
    first.evaluate()
    gate = OneGate()
    gate.position = Position(4, committed=4, ended=(4, 1), told=told)
    gate.found = (gate.position, Position(ended=(5, 0)))
    second = Rank(gate, first.log)
    second.evaluate()
    assert second.seen == []
    assert second.host.state == {"seed": 27, "consumed": 3}
    assert next(second.data) == 3
    # What its predecessor had no time to say.
    assert second.said == (["loss 3"] if told == (4, 0) else [])


def test_without_what_the_predecessor_ended_with_the_job_says_so() -> None:
    gate = OneGate()
    gate.found = (Position(ended=(4, 1)), Position(ended=(5, 0)))
    with pytest.raises(NothingToRebuildFrom, match="interlude/4/0/end"):
        Rank(gate).evaluate()
    assert gate.lost == ["what rank 0 logged under interlude/4/0/end is gone"]


def test_an_error_of_its_own_is_nobody_elses() -> None:
    rank = Rank(OneGate())

    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        rank.evaluate(then=fail)
    assert rank.gate.paused == []


def test_what_was_done_outside_of_the_job_is_not_done_again() -> None:
    """Three attempts to write: cut before it is done, cut when it is done, and none."""
    gate = OneGate()
    rank = Rank(gate)
    outside = {"named": 3}
    attempts: list[int] = []
    asked: list[Any] = []

    def run(say: Callable[[str], None]) -> None:
        attempts.append(outside["named"])
        if len(attempts) == 2:
            outside["named"] = 4
        raise Interrupted("a peer was lost")

    def again(note: Any) -> bool:
        asked.append(note)
        return outside["named"] == 4

    rank.interludes.run(Interlude("save", run, note=lambda: dict(outside), again=again))
    assert attempts == [3, 3]
    assert asked == [{"named": 3}, {"named": 3}]
    assert rank.log.read_state(InterludeKey(4, 0, "note")) == {"named": 3}
