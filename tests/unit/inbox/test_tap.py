"""What crosses stages is logged once and fed back; what is missing fails at once, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_stage import ITERATION, Collective, Stage

from megatron_moetion.inbox.key import BoundaryKey, CollectiveKey, Direction
from megatron_moetion.inbox.tap import Cursor, Mode, at
from megatron_moetion.recovery.failure import Interrupted, MissingFromInbox
from megatron_moetion.recovery.plan import Progress
from megatron_moetion.recovery.waiting import Wait

LOST = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")


def group(stage: Stage, position: int) -> Any:
    """0: inside stage 0; 1: across stages; 2: of other ranks."""
    return stage.groups._groups[position]


def reduce(stage: Stage, host: Collective, start: float = 0.0, **kwargs: Any) -> float:
    tensor = torch.tensor([start])
    stage.collectives.call("all_reduce", host, tensor, **kwargs)
    return float(tensor)


class TestCollectives:
    def test_without_a_session_mode_nothing_is_touched(self, stage: Stage) -> None:
        stage.cursor.mode = Mode.OFF
        assert reduce(stage, Collective()) == 1
        assert stage.log.read(CollectiveKey(ITERATION, "world", 0), [0]) is None
        assert stage.gate.asked == []

    def test_a_result_that_crosses_stages_is_logged_and_fed_back_in_call_order(
        self, stage: Stage
    ) -> None:
        across = group(stage, 1)
        live = [reduce(stage, Collective(), 10), reduce(stage, Collective(), 20, group=across)]
        live += [reduce(stage, Collective(), 30)]
        stage.restart(Mode.REPLAY)
        silent = Collective()
        replayed = [reduce(stage, silent), reduce(stage, silent, group=across)]
        replayed += [reduce(stage, silent)]
        assert live == replayed == [11, 21, 31]
        assert silent.calls == 0

    def test_inside_a_stage_nothing_is_logged_and_replay_runs_it_again(self, stage: Stage) -> None:
        inside, host = group(stage, 0), Collective()
        reduce(stage, host, group=inside)
        stage.restart(Mode.REPLAY)
        assert reduce(stage, host, 5, group=inside) == 6
        assert host.calls == 2
        assert stage.gate.asked == []

    def test_a_missing_collective_fails_at_once_and_by_name(self, stage: Stage) -> None:
        reduce(stage, Collective(), group=group(stage, 1))
        stage.restart(Mode.REPLAY)
        silent = Collective()
        reduce(stage, silent, group=group(stage, 1))
        says = r"iteration 5 met all_reduce number 1 on group g1 \[0, 2\], which nobody logged"
        with pytest.raises(MissingFromInbox, match=says):
            reduce(stage, silent, group=group(stage, 1))
        assert silent.calls == 0

    def test_in_replay_the_log_of_another_member_serves_too(self, stage: Stage) -> None:
        stage.logs[2].write(CollectiveKey(ITERATION, "g1", 0), [torch.tensor([7.0])])
        stage.cursor.mode = Mode.REPLAY
        assert reduce(stage, Collective(), group=group(stage, 1)) == 7

    def test_asynchronous_across_stages_is_refused_inside_it_is_not(self, stage: Stage) -> None:
        with pytest.raises(MissingFromInbox, match=r"asynchronous all_reduce on group g1"):
            reduce(stage, Collective(), group=group(stage, 1), async_op=True)
        assert reduce(stage, Collective(), group=group(stage, 0), async_op=True) == 1

    def test_a_kind_that_cannot_be_logged_is_refused_by_name_only_across_stages(
        self, stage: Stage
    ) -> None:
        host = Collective()
        with pytest.raises(MissingFromInbox, match=r"gather on group world .* cannot be logged"):
            stage.collectives.call("gather", host, torch.zeros(1))
        stage.collectives.call("gather", host, torch.zeros(1), group=group(stage, 0))
        assert host.calls == 1

    def test_groups_of_other_ranks_pass_through(self, stage: Stage) -> None:
        assert reduce(stage, Collective(), group=group(stage, 2)) == 1
        assert stage.gate.asked == []

    def test_lists_of_results_are_fed_back_into_the_callers_tensors(self, stage: Stage) -> None:
        def all_gather(tensor_list: list[Any], tensor: Any, group: Any = None) -> None:
            for index, each in enumerate(tensor_list):
                each.fill_(index + 1)

        def never(tensor_list: list[Any], tensor: Any, group: Any = None) -> None:
            raise AssertionError("replay communicated")

        results = []
        for host in (all_gather, never):
            outputs = [torch.zeros(1) for _ in range(4)]
            stage.collectives.call("all_gather", host, outputs, torch.zeros(1))
            results.append([float(t) for t in outputs])
            stage.restart(Mode.REPLAY)
        assert results[0] == results[1] == [1, 2, 3, 4]

    def test_a_parameter_that_requires_gradients_can_be_fed(self, stage: Stage) -> None:
        reduce(stage, Collective(), 3)
        stage.restart(Mode.REPLAY)
        leaf = torch.zeros(1, requires_grad=True)
        stage.collectives.call("all_reduce", Collective(), leaf)
        assert leaf.item() == 4

    def test_the_world_counts_as_passed_once_met_live_or_fed(self, stage: Stage) -> None:
        reduce(stage, Collective(), group=group(stage, 1))
        assert not stage.collectives.world_passed
        reduce(stage, Collective())
        assert stage.collectives.world_passed
        stage.collectives.world_passed = False
        stage.collectives.pass_world(torch.device("cpu"))
        assert stage.collectives.world_passed


class TestALostPeer:
    def test_another_error_is_raised_as_it_is(self, stage: Stage) -> None:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            reduce(stage, Collective(RuntimeError("illegal memory access")))
        assert stage.gate.asked == ["norm"]

    def test_before_the_commit_point_an_iteration_that_others_passed_takes_their_result(
        self, stage: Stage
    ) -> None:
        stage.logs[3].write(CollectiveKey(ITERATION, "world", 0), [torch.tensor([9.0])])
        assert reduce(stage, Collective(LOST)) == 9
        assert stage.gate.asked == ["norm", "await_commit"]
        mine = stage.log.read(CollectiveKey(ITERATION, "world", 0), [0])
        assert mine is not None
        assert mine[0].tolist() == [9]

    def test_before_the_commit_point_an_iteration_that_nobody_passed_is_given_up(
        self, stage: Stage
    ) -> None:
        def given_up() -> None:
            raise Interrupted("iteration 5 is given up")

        stage.gate.on_await = given_up
        with pytest.raises(Interrupted):
            reduce(stage, Collective(LOST))

    def test_a_committed_iteration_whose_result_nobody_holds_is_an_error(
        self, stage: Stage
    ) -> None:
        with pytest.raises(MissingFromInbox, match="nobody holds collective/5/world/0"):
            reduce(stage, Collective(LOST))

    @pytest.mark.parametrize("position", [0, 1], ids=["inside a stage", "across stages"])
    def test_small_talk_is_repeated_from_its_inputs_after_a_pause(
        self, stage: Stage, position: int
    ) -> None:
        stage.cursor.progress = Progress.AFTER_STEP
        host = Collective(LOST, LOST)
        assert reduce(stage, host, 10, group=group(stage, position)) == 11
        assert (host.calls, stage.gate.asked) == (3, ["pause", "pause"])

    def test_small_talk_that_a_peer_finished_is_taken_from_its_log(self, stage: Stage) -> None:
        stage.cursor.progress = Progress.AFTER_STEP
        key = CollectiveKey(ITERATION, "g0", 0)
        stage.gate.on_pause = lambda: stage.logs[1].write(key, [torch.tensor([42.0])])
        host = Collective(LOST)
        assert reduce(stage, host, 10, group=group(stage, 0)) == 42
        assert host.calls == 1

    def test_after_a_pause_the_rest_of_the_small_talk_is_fed_where_peers_have_it(
        self, stage: Stage
    ) -> None:
        stage.cursor.progress, stage.cursor.refeed = Progress.AFTER_STEP, ITERATION
        stage.logs[2].write(CollectiveKey(ITERATION, "g1", 0), [torch.tensor([8.0])])
        host = Collective()
        found = [reduce(stage, host, group=group(stage, 1)) for _ in range(2)]
        assert found == [8, 1]
        assert host.calls == 1

    def test_a_result_that_comes_after_a_failure_was_told_is_not_taken(self, stage: Stage) -> None:
        # On a GPU an aborted collective ends as if all were well.
        stage.cursor.progress, waits = Progress.AFTER_STEP, stage.groups.waits
        waits.call_off(1, Wait.MAKING)
        seen = []

        def renewed() -> None:
            seen.append(stage.log.read(CollectiveKey(ITERATION, "world", 0), [0]))
            waits.renew(1)

        stage.gate.on_pause, host = renewed, Collective()
        assert reduce(stage, host, 10) == 11
        assert (host.calls, stage.gate.asked, seen) == (2, ["pause"], [None])

    def test_in_the_next_iteration_nothing_is_fed(self, stage: Stage) -> None:
        stage.cursor.refeed = ITERATION - 1
        stage.logs[2].write(CollectiveKey(ITERATION, "g1", 0), [torch.tensor([8.0])])
        assert reduce(stage, Collective(), group=group(stage, 1)) == 1


class TestBoundaries:
    def test_what_is_sent_is_logged_by_direction_and_order(self, stage: Stage) -> None:
        for value in (1.0, 2.0):
            stage.boundaries.sent(Direction.FORWARD, torch.tensor([value], dtype=torch.bfloat16))
        stage.boundaries.sent(Direction.BACKWARD, None)
        for ordinal, value in enumerate((1.0, 2.0)):
            key = BoundaryKey(ITERATION, Direction.FORWARD, ordinal)
            found = stage.log.read(key, [0])
            assert found is not None
            assert found[0].tolist() == [value]
        assert stage.log.read(BoundaryKey(ITERATION, Direction.BACKWARD, 0), [0]) is None

    def test_replay_receives_from_the_neighbours_logs_in_order(self, stage: Stage) -> None:
        # Two stages: rank 2 is both the next and, cyclically, the previous one.
        for direction, base in ((Direction.FORWARD, 10), (Direction.BACKWARD, 20)):
            for ordinal in range(2):
                key = BoundaryKey(ITERATION, direction, ordinal)
                stage.logs[2].write(key, [torch.tensor([base + ordinal])])
        stage.cursor.mode = Mode.REPLAY
        order = [Direction.BACKWARD, Direction.FORWARD, Direction.FORWARD, Direction.BACKWARD]
        assert [int(stage.boundaries.receive(d)) for d in order] == [20, 10, 11, 21]

    def test_a_boundary_tensor_that_nobody_logged_fails_at_once_and_by_name(
        self, stage: Stage
    ) -> None:
        stage.cursor.mode = Mode.REPLAY
        says = "replay needs boundary/5/backward/0 of global rank 2"
        with pytest.raises(MissingFromInbox, match=says):
            stage.boundaries.receive(Direction.BACKWARD)

    def test_nothing_is_logged_outside_of_training_steps(self, stage: Stage) -> None:
        stage.cursor.mode = Mode.OFF
        stage.boundaries.sent(Direction.FORWARD, torch.ones(1))
        assert stage.log.read(BoundaryKey(ITERATION, Direction.FORWARD, 0), [0]) is None


class TestBatches:
    def test_replay_draws_the_same_batches_and_leaves_the_iterator_alone(
        self, stage: Stage
    ) -> None:
        data = iter(range(100))
        draw = lambda: {"tokens": torch.tensor([next(data)]), "n": None}  # noqa: E731
        live = [int(stage.batches.draw(0, draw)["tokens"]) for _ in range(3)]
        stage.restart(Mode.REPLAY)
        again = [int(stage.batches.draw(0, draw)["tokens"]) for _ in range(3)]
        assert live == again == [0, 1, 2]
        assert next(data) == 3

    def test_after_an_abort_drawn_batches_come_again_and_new_ones_after_them(
        self, stage: Stage
    ) -> None:
        data = iter(range(100))
        drawn = [stage.batches.draw(chunk, lambda: next(data)) for chunk in (0, 1, 0)]
        stage.restart(Mode.LIVE)
        again = [stage.batches.draw(chunk, lambda: next(data)) for chunk in (0, 1, 0, 0, 1)]
        assert again == [*drawn, 3, 4]

    def test_a_batch_that_is_not_in_the_log_fails_at_once_and_by_name(self, stage: Stage) -> None:
        stage.cursor.mode = Mode.REPLAY
        with pytest.raises(MissingFromInbox, match="replay needs batch/5/1/0"):
            stage.batches.draw(1, lambda: pytest.fail("replay drew from the iterator"))

    def test_after_the_step_and_in_evaluation_batches_are_not_logged(self, stage: Stage) -> None:
        stage.cursor.progress = Progress.AFTER_STEP
        assert stage.batches.draw(0, lambda: 7) == 7
        stage.restart(Mode.OFF)
        assert stage.batches.draw(0, lambda: 8) == 8
        stage.restart(Mode.LIVE)
        assert stage.batches.draw(0, lambda: 9) == 9


def test_a_nested_stretch_leaves_the_cursor_as_it_was_also_after_an_error() -> None:
    cursor = Cursor(Mode.LIVE, 7, Progress.STEPPING)
    cursor.take("x")

    def nested() -> None:
        with at(cursor, Mode.REPLAY, 3, Progress.BEFORE_COMMIT):
            assert (cursor.mode, cursor.iteration, cursor.take("x")) == (Mode.REPLAY, 3, 0)
            raise KeyError

    with pytest.raises(KeyError):
        nested()
    assert (cursor.mode, cursor.iteration, cursor.progress) == (Mode.LIVE, 7, Progress.STEPPING)
    assert cursor.take("x") == 1


class TestWithoutReplay:
    """The shard cut."""

    @pytest.fixture(autouse=True)
    def by_shard(self, stage: Stage) -> None:
        stage.cursor.replays = False

    def test_nothing_that_crosses_stages_is_logged(self, stage: Stage) -> None:
        across = group(stage, 1)
        assert reduce(stage, Collective(), 10, group=across) == 11
        stage.boundaries.sent(Direction.FORWARD, torch.ones(2))
        assert stage.log.read(CollectiveKey(ITERATION, "g1", 0), [0]) is None
        assert stage.log.read(BoundaryKey(ITERATION, Direction.FORWARD, 0), [0]) is None
        assert stage.gate.asked == ["norm", "update"]

    def test_a_world_that_was_met_is_seen(self, stage: Stage) -> None:
        stage.collectives.world_passed = False
        reduce(stage, Collective())
        assert stage.collectives.world_passed

    def test_before_the_step_what_is_cut_is_given_up(self, stage: Stage) -> None:
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            reduce(stage, Collective(LOST), group=group(stage, 1))
        assert not {"pause", "await_commit"} & set(stage.gate.asked)

    @pytest.mark.parametrize("position", [None, 1], ids=["the world", "across stages"])
    def test_what_all_agree_on_in_the_step_is_logged_for_those_that_do_not_hear_it(
        self, stage: Stage, position: int | None
    ) -> None:
        stage.cursor.closing, where = True, None if position is None else group(stage, position)
        assert reduce(stage, Collective(), 10, group=where) == 11
        label = stage.groups.name(where)
        written = stage.log.read(CollectiveKey(ITERATION, label, 0), [0])
        assert written is not None
        assert written[0].tolist() == [11]
        stage.logs[2].write(CollectiveKey(ITERATION, label, 1), [torch.tensor([9.0])])
        assert reduce(stage, Collective(LOST), group=where) == 9
        assert stage.gate.asked == ["norm", "norm", "await_commit"]

    def test_behind_what_nobody_logs_the_world_is_not_passed(self, stage: Stage) -> None:
        stage.cursor.closing = True
        reduce(stage, Collective())
        assert stage.collectives.world_passed
        reduce(stage, Collective(), group=group(stage, 0))
        assert not stage.collectives.world_passed
        reduce(stage, Collective())
        reduce(stage, Collective(), async_op=True)
        assert not stage.collectives.world_passed

    def test_what_may_belong_to_the_update_is_up_to_the_gate(self, stage: Stage) -> None:
        stage.cursor.progress = Progress.STEPPING
        assert reduce(stage, Collective(), 10, group=group(stage, 0)) == 11
        assert stage.gate.asked == ["update"]

    @pytest.mark.parametrize("progress", [Progress.AFTER_STEP, Progress.RETURNED])
    def test_behind_the_step_it_is_repeated(self, stage: Stage, progress: Progress) -> None:
        stage.cursor.progress = progress
        assert reduce(stage, Collective(LOST), 10, group=group(stage, 1)) == 11
        assert "pause" in stage.gate.asked

    def test_an_iteration_that_is_run_again_has_its_own_results_until_it_returns(
        self, stage: Stage
    ) -> None:
        stage.logs[2].write(CollectiveKey(ITERATION, "g1", 0), [torch.tensor([8.0])])
        stage.cursor.since, stage.cursor.refeed = 1, ITERATION
        found = []
        for progress in (Progress.AFTER_STEP, Progress.RETURNED):
            stage.cursor.progress = progress
            stage.cursor.counts.clear()
            found.append(reduce(stage, Collective(), group=group(stage, 1)))
        # Its own log has epoch 0, too, and is asked first.
        assert found == [1, 1]
        stage.cursor.counts.clear()
        stage.logs[2].epoch = 1
        stage.logs[2].write(CollectiveKey(ITERATION, "g1", 0), [torch.tensor([7.0])])
        stage.cursor.progress = Progress.AFTER_STEP
        assert reduce(stage, Collective(), group=group(stage, 1)) == 7


class TestBatchesOfAPredecessor:
    def test_iterations_that_a_predecessor_drew_come_from_its_log(self, stage: Stage) -> None:
        drawn = stage.batches.draw(0, lambda: {"tokens": torch.tensor([1, 2])})
        stage.batches.newest = ITERATION + 1
        stage.cursor.counts.clear()
        again = stage.batches.draw(0, lambda: pytest.fail("drawn twice"))
        assert torch.equal(again["tokens"], drawn["tokens"])
