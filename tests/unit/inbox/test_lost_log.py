"""What the taps do in a replay where the log of the predecessor is lost with its node."""

from __future__ import annotations

import pytest
import torch
from one_stage import ITERATION, Collective, Stage

from megatron_moetion.inbox.key import BatchKey, BoundaryKey, CollectiveKey, Direction
from megatron_moetion.inbox.tap import Mode
from megatron_moetion.recovery.failure import MissingFromInbox
from megatron_moetion.recovery.plan import Progress


class ScriptedEdges:
    """Remembers what it was told; `appears` is logged by its sender once it is waited for."""

    def __init__(self, stage: Stage, there: set[str] = frozenset(), appears: float | None = None):  # type: ignore[assignment]
        self.stage, self.there, self.appears = stage, there, appears
        self.told: list[str] = []

    def logged(self, key: BoundaryKey) -> bool:
        return str(key) in self.there

    def tell(self, key: BoundaryKey) -> None:
        assert self.stage.log.read(key, [0]) is not None
        self.told.append(str(key))

    def wait(self, sender: int, key: BoundaryKey) -> bool:
        if self.appears is None:
            return False
        self.stage.logs[sender].write(key, [torch.tensor([self.appears])])
        return True


def sent(ordinal: int) -> BoundaryKey:
    return BoundaryKey(ITERATION, Direction.FORWARD, ordinal)


def test_a_replay_logs_what_it_sends_unless_it_is_in_the_log(stage: Stage) -> None:
    stage.boundaries.sent(Direction.FORWARD, torch.tensor([1.0]))
    stage.restart(Mode.REPLAY)
    edges = ScriptedEdges(stage, {str(sent(0))})
    stage.boundaries.begin_replay(edges)
    for value in (8.0, 2.0):
        stage.boundaries.sent(Direction.FORWARD, torch.tensor([value]))
    stage.boundaries.sent(Direction.BACKWARD, None)
    found = [stage.log.read(sent(ordinal), [0]) for ordinal in (0, 1)]
    assert [float(tensor) for tensors in found if tensors for tensor in tensors] == [1.0, 2.0]
    assert edges.told == [str(sent(0)), str(sent(1))]


def test_what_a_neighbour_is_about_to_send_once_more_is_waited_for(stage: Stage) -> None:
    stage.restart(Mode.REPLAY)
    stage.boundaries.begin_replay(ScriptedEdges(stage, appears=7.0))
    assert stage.boundaries.receive(Direction.BACKWARD) == 7
    stage.boundaries.begin_replay(ScriptedEdges(stage))
    with pytest.raises(MissingFromInbox, match="replay needs boundary/5/backward/1"):
        stage.boundaries.receive(Direction.BACKWARD)


def test_a_result_that_comes_from_a_peer_is_logged_here_too(stage: Stage) -> None:
    key = CollectiveKey(ITERATION, "g1", 0)
    stage.logs[2].write(key, [torch.tensor([4.0])])
    stage.restart(Mode.REPLAY)
    tensor = torch.zeros(1)
    stage.collectives.call("all_reduce", Collective(), tensor, group=stage.groups._groups[1])
    mine = stage.log.read(key, [0])
    assert tensor == 4
    assert mine is not None
    assert mine[0] == 4


def test_what_ranks_of_one_stage_agreed_on_is_asked_again_where_nobody_knows(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Collective()
    call = stage.collectives.call
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda t, **kw: call("all_reduce", host, t, **kw)
    )
    inside, across = stage.groups._groups[:2]
    stage.restart(Mode.REPLAY)
    tensor = torch.zeros(1)
    stage.collectives.all_reduce(tensor, group=inside)
    assert (float(tensor), host.calls) == (1, 1)
    with pytest.raises(MissingFromInbox, match="which nobody logged"):
        stage.collectives.all_reduce(torch.zeros(1), group=across)
    stage.restart(Mode.REPLAY)
    stage.collectives.all_reduce(tensor, group=inside)
    assert (float(tensor), host.calls) == (1, 1)


class TestBatches:
    """Two a chunk and iteration; the iterators begin with those of two iterations before."""

    @pytest.fixture(autouse=True)
    def anew(self, stage: Stage) -> None:
        stage.restart(Mode.REPLAY)
        self.data = [iter(range(chunk, 1000)) for chunk in (0, 100)]
        stage.batches.begin_anew(ITERATION - 2, 2)

    def draw(self, stage: Stage, chunk: int) -> int:
        found = stage.batches.draw(chunk, lambda: next(self.data[chunk]))
        return int(found)

    def test_a_replay_draws_what_comes_next_and_skips_what_it_does_not_need(
        self, stage: Stage
    ) -> None:
        stage.cursor.iteration = ITERATION - 1
        assert [self.draw(stage, 0) for _ in range(2)] == [2, 3]
        stage.cursor.iteration = ITERATION
        stage.restart(Mode.REPLAY)
        assert [self.draw(stage, 1) for _ in range(2)] == [104, 105]
        assert [self.draw(stage, 0) for _ in range(2)] == [4, 5]
        skipped = stage.log.read_state(BatchKey(ITERATION - 2, 1, 1))
        assert skipped == 101

    def test_training_and_what_is_run_again_go_on_in_order(self, stage: Stage) -> None:
        assert [self.draw(stage, 0) for _ in range(2)] == [4, 5]
        stage.cursor.iteration = ITERATION + 1
        stage.restart(Mode.LIVE)
        assert self.draw(stage, 0) == 6
        stage.restart(Mode.LIVE)
        assert [self.draw(stage, 0) for _ in range(2)] == [6, 7]
        # Another failure: an older base.
        stage.cursor.iteration = ITERATION - 2
        stage.restart(Mode.REPLAY)
        assert [self.draw(stage, 0) for _ in range(2)] == [0, 1]

    def test_what_comes_before_the_first_fails_by_name(self, stage: Stage) -> None:
        stage.cursor.iteration = ITERATION - 3
        with pytest.raises(MissingFromInbox, match="replay needs batch/2/0/0"):
            self.draw(stage, 0)

    def test_small_talk_draws_as_ever(self, stage: Stage) -> None:
        stage.cursor.progress = Progress.AFTER_STEP
        assert self.draw(stage, 0) == 0
