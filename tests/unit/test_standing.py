"""A commit point is passed before a freeze or not at all, and the leader is told what is true."""

from __future__ import annotations

import pytest
import torch
from one_rank import Rank

from megatron_moetion.inbox.tap import Mode
from megatron_moetion.recovery.failure import Interrupted
from megatron_moetion.recovery.plan import Progress

BEFORE, STEPPING = Progress.BEFORE_COMMIT, Progress.STEPPING
AFTER, RETURNED = Progress.AFTER_STEP, Progress.RETURNED


@pytest.fixture(params=["stage", "shard"])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rank:
    monkeypatch.setenv("MASTER_PORT", "1")
    return Rank(request.param)


@pytest.fixture
def by_shard(monkeypatch: pytest.MonkeyPatch) -> Rank:
    monkeypatch.setenv("MASTER_PORT", "1")
    return Rank("shard")


@pytest.fixture
def by_stage(monkeypatch: pytest.MonkeyPatch) -> Rank:
    monkeypatch.setenv("MASTER_PORT", "1")
    return Rank("stage")


def test_without_a_freeze_the_commit_point_is_passed_and_told(rank: Rank) -> None:
    rank.standing.commit()
    assert (rank.standing.position.committed, rank.cursor.progress) == (5, STEPPING)
    assert rank.leader.heard("position")[-1]["position"]["committed"] == 5


@pytest.mark.parametrize("committed", [4, 5])
def test_under_a_freeze_only_the_verdict_lets_a_rank_pass(rank: Rank, committed: int) -> None:
    rank.hears("freeze", dead=[3])
    (report,) = rank.leader.heard("report")
    assert report["position"]["committed"] == 4
    rank.hears("verdict", committed=committed)
    if committed == 5:
        rank.standing.commit()
    else:
        with pytest.raises(Interrupted, match="iteration 5 is given up"):
            rank.standing.commit()
    assert rank.standing.position.committed == committed


def test_in_the_stage_that_is_rebuilt_no_verdict_lets_a_rank_pass(by_stage: Rank) -> None:
    by_stage.hears("freeze", dead=[1])
    by_stage.hears("verdict", committed=5)
    with pytest.raises(Interrupted):
        by_stage.standing.commit()
    assert by_stage.standing.position.committed == 4


def test_the_end_of_an_interlude_is_not_told_under_a_freeze(rank: Rank) -> None:
    rank.at(RETURNED, 5)
    rank.hears("freeze", dead=[3])
    with pytest.raises(Interrupted):
        rank.standing.ended(5, 1)
    assert rank.standing.position.ended == (5, 0)
    rank.standing.resumed(1)
    rank.standing.ended(5, 1)
    assert rank.standing.position.ended == (5, 1)


def test_who_finishes_the_committed_iteration_settles_behind_it_and_says_so_once(
    rank: Rank,
) -> None:
    rank.at(STEPPING, 5)
    rank.hears("freeze", dead=[3])
    rank.hears("verdict", committed=5)
    assert rank.leader.heard("settled") == []
    rank.at(AFTER, 5)
    rank.at(RETURNED, 5)
    assert rank.leader.heard("settled") == [{"op": "settled", "epoch": 1}]


def test_who_is_to_give_up_settles_at_once(rank: Rank) -> None:
    rank.hears("freeze", dead=[3])
    rank.standing.settle()
    assert rank.leader.heard("settled") == []
    rank.hears("verdict", committed=4)
    assert rank.leader.heard("settled") == [{"op": "settled", "epoch": 1}]


def test_a_failure_that_is_told_while_a_recovery_ends_freezes_all_the_same(rank: Rank) -> None:
    rank.hears("freeze", dead=[3])
    rank.hears("verdict", committed=4)
    rank.hears("resume")
    rank.hears("freeze", epoch=2, dead=[3])
    # The training thread comes here only now.
    rank.standing.resumed(1)
    rank.hears("verdict", epoch=2, committed=4)
    with pytest.raises(Interrupted):
        rank.standing.commit()
    assert [told["epoch"] for told in rank.leader.heard("settled")] == [1, 2]


def test_who_is_taken_for_dead_reports_nothing(rank: Rank) -> None:
    rank.hears("freeze", dead=[0, 3])
    assert rank.leader.heard("report") == []


def test_a_peer_that_is_lost_in_an_update_by_shard_is_made_up_for_later(by_shard: Rank) -> None:
    by_shard.at(STEPPING, 5)
    by_shard.hears("freeze", dead=[3])
    assert by_shard.standing.update(_lost) is None
    assert not by_shard.standing.position.gathered


@pytest.mark.parametrize("progress", [BEFORE, AFTER, RETURNED])
def test_before_and_behind_the_update_nothing_is_given_up(
    by_shard: Rank, progress: Progress
) -> None:
    by_shard.at(progress)
    by_shard.hears("freeze", dead=[3])
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        by_shard.standing.update(_lost)
    assert by_shard.standing.position.gathered


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.REPLAY])
def test_what_a_rebuild_asks_of_its_peers_is_no_update(by_shard: Rank, mode: Mode) -> None:
    by_shard.at(STEPPING, 5)
    by_shard.cursor.mode = mode
    by_shard.hears("freeze", dead=[3])
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        by_shard.standing.update(_lost)


def test_no_unknown_error_is_taken_for_a_lost_peer(by_shard: Rank) -> None:
    by_shard.at(STEPPING, 5)
    by_shard.hears("freeze", dead=[3])
    with pytest.raises(ZeroDivisionError):
        by_shard.standing.update(lambda: 1 // 0)
    assert by_shard.standing.update(lambda: torch.ones(1)) == 1


def test_a_stage_has_its_update_to_itself(by_stage: Rank) -> None:
    by_stage.at(STEPPING, 5)
    by_stage.hears("freeze", dead=[1])
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        by_stage.standing.update(_lost)


def _lost() -> None:
    raise RuntimeError("Connection closed by peer")
