"""What a job starts from: the newest spill that every node holds whole, or a checkpoint."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moetion.agent.coldstart import (
    CheckpointsDiffer,
    ColdStart,
    NoSpillLeft,
    SpillDoesNotFit,
    Start,
    mismatch,
    position_at,
    share_over,
    stored,
)
from megatron_moetion.agent.fallback import AFRESH, Limit, Source, Stored
from megatron_moetion.agent.membership import Member, Members
from megatron_moetion.recovery.plan import Position, Progress
from megatron_moetion.vault import Vault, spill
from megatron_moetion.vault.shelf import StoreShelf
from megatron_moetion.vault.spill import Span
from megatron_moetion.vault.store import VaultStore

NODES = (Member(0, "a", 1, 2, 0), Member(1, "b", 1, 2, 2))
LAYOUT = ((0, 1), (2, 3))
OLD, NEW = spill.name_of(4, "job"), spill.name_of(8, "job")


class Board:
    """Values that wait for whoever asks, as torch's store does."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values)
            return self._values[key].encode()


def spill_at(root: Path, name: str, node_rank: int) -> None:
    iteration = spill.iteration_of(name)
    store, span = VaultStore(), Span(iteration - 1, iteration)
    for rank in LAYOUT[node_rank]:
        vault = Vault(StoreShelf(store, rank), rank)
        for kind, i in sorted(span.required):
            vault.put(f"{kind}/{i}/x", torch.full((50,), i + rank, dtype=torch.uint8), {})
    spill.write(root, store, name, span, node_rank, LAYOUT, {"num_layers": "2"})
    store.close()


@pytest.fixture(params=["one folder", "a folder each"])
def roots(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Where nodes 0 and 1 keep their spills: on a shared file system or not."""
    if request.param == "one folder":
        return (tmp_path, tmp_path)
    return (tmp_path / "0", tmp_path / "1")


@pytest.fixture
def spilled(roots: tuple[Path, Path]) -> tuple[Path, Path]:
    for name in (OLD, NEW):
        for node_rank, root in enumerate(roots):
            spill_at(root, name, node_rank)
    return roots


Roots = tuple[Path | None, Path | None]


def take(
    roots: Roots,
    checkpoint: int | None = None,
    nodes: tuple[Member, ...] = NODES,
    limits: tuple[Limit | None, Limit | None] = (None, None),
    seen_by_1: int | None = None,
) -> list[tuple[Start, list[str]]]:
    """What each node takes, and the keys of its first rank.

    Args:
        limits: by node.
        seen_by_1: the checkpoint that node 1 sees, if it is another one.
    """
    board = Board()

    def run(node_rank: int) -> tuple[Start, list[str]]:
        members, store = Members(nodes, node_rank), VaultStore()
        seen = seen_by_1 if node_rank and seen_by_1 is not None else checkpoint
        share, limit = share_over(board, members), limits[node_rank]
        start = ColdStart(roots[node_rank], members, share, seen, limit).take(store)
        keys = [e.key for e in store.inventory(LAYOUT[node_rank][0], "frame/")]
        store.close()
        return start, keys

    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(run, range(len(nodes))))


def up_to(iteration: int, is_spill: bool) -> Limit:
    """For a job that has begun from iteration 8, too."""
    return Limit(Source(iteration, is_spill), Source(8, True))


def names_of(outcome: list[tuple[Start, list[str]]]) -> list[str | None]:
    return [start.record and start.record.name for start, _ in outcome]


def taken(roots: Roots, **options: Any) -> list[str | None]:
    return names_of(take(roots, **options))


def test_the_newest_is_taken_and_loaded(
    spilled: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = take(spilled)
    assert names_of(outcome) == [NEW, NEW]
    assert {start.source for start, _ in outcome} == {Source(8, True)}
    assert [keys for _, keys in outcome] == [["frame/7/x", "frame/8/x"]] * 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"moetion-run: starting from the spill of iteration 8 in {spilled[0]}"]


@pytest.mark.parametrize("node_rank", [0, 1])
@pytest.mark.parametrize("file", ["rank{rank}.safetensors", "node{node}.json"])
def test_a_damaged_one_on_any_node_is_named_and_the_next_older_one_taken(
    spilled: tuple[Path, Path], node_rank: int, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = file.format(rank=LAYOUT[node_rank][1], node=node_rank)
    path = spilled[node_rank] / NEW / name
    path.write_bytes(path.read_bytes()[:-1])
    outcome = take(spilled)
    assert names_of(outcome) == [OLD, OLD]
    # Nothing of the damaged one is left, on the node with the good part either.
    assert [keys for _, keys in outcome] == [["frame/3/x", "frame/4/x"]] * 2
    lines = capsys.readouterr().err
    assert f"moetion-run: damaged spill: {path}" in lines
    assert "starting from the spill of iteration 4" in lines


def test_one_that_not_every_node_has_is_none(spilled: tuple[Path, Path]) -> None:
    spill.discard(spilled[1], NEW, 1, LAYOUT[1])
    assert taken(spilled) == [OLD, OLD]


def test_parts_of_two_jobs_are_not_put_together(roots: tuple[Path, Path]) -> None:
    for node_rank, root in enumerate(roots):
        spill_at(root, spill.name_of(8, f"job{node_rank}"), node_rank)
    assert taken(roots) == [None, None]


def test_without_any_the_start_is_fresh_and_says_so(
    roots: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert taken(roots) == [None, None]
    assert capsys.readouterr().err.count("a fresh start") == 1


@pytest.mark.parametrize(("checkpoint", "expected"), [(7, NEW), (8, NEW), (9, None), (None, NEW)])
def test_a_checkpoint_of_the_host_wins_only_if_it_is_newer(
    spilled: tuple[Path, Path],
    checkpoint: int | None,
    expected: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert taken(spilled, checkpoint=checkpoint) == [expected, expected]
    (line,) = capsys.readouterr().err.splitlines()
    assert ("not started from the spill of iteration 8" in line) == (expected is None)


def test_another_layout_is_refused(spilled: tuple[Path, Path]) -> None:
    nodes = (replace(NODES[0], num_workers=3), replace(NODES[1], num_workers=1))
    with pytest.raises(SpillDoesNotFit, match=r"was made with ranks .* by node and this job"):
        take(spilled, nodes=nodes)


def test_another_identity_is_refused_by_name(spilled: tuple[Path, Path]) -> None:
    record = spill.read_record(spilled[0], NEW, 0)
    assert mismatch(record, {"num_layers": "2"}) is None
    reason = mismatch(record, {"num_layers": "4"})
    assert reason is not None
    assert "num_layers was 2 and is 4" in reason
    many = str(mismatch(record, dict.fromkeys("abcd", "1")))
    assert "a was not there and is 1, b was not there and is 1, c was" in many
    assert " and 2 more; start with" in many


def test_a_rank_stands_at_the_start_of_the_next_iteration() -> None:
    position = Position.from_json(json.loads(json.dumps(position_at(8))))
    assert position == Position(9, Progress.BEFORE_COMMIT, committed=8, logged=8)


def damage(root: Path, name: str) -> None:
    path = root / name / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_training_does_not_begin_afresh_where_all_spills_are_damaged(
    spilled: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (OLD, NEW):
        damage(spilled[0], name)
    with pytest.raises(NoSpillLeft, match="is sound, and --load names no Megatron checkpoint"):
        take(spilled)
    assert taken(spilled, checkpoint=3) == [None, None]
    assert "--load of iteration 3" in capsys.readouterr().err


def test_nor_where_a_spill_that_was_there_is_gone(roots: tuple[Path, Path]) -> None:
    limits = (up_to(8, True), up_to(8, True))
    with pytest.raises(NoSpillLeft):
        take(roots, limits=limits)
    assert taken(roots, limits=limits, checkpoint=3) == [None, None]


def test_where_the_job_begins_again_nothing_is_taken_that_is_better_than_node_0_says(
    spilled: tuple[Path, Path],
) -> None:
    # Node 1 has just come, in place of one that was lost.
    limits = (up_to(7, True), None)
    assert taken(spilled, limits=limits) == [OLD, OLD]
    assert taken(spilled, limits=limits, checkpoint=8) == [OLD, OLD]
    # One of iteration 9 was saved behind what node 0 saw.
    for checkpoint in (5, 9):
        outcome = take(spilled, limits=limits, checkpoint=checkpoint)
        assert {start.source for start, _ in outcome} == {Source(checkpoint, False)}
    damage(spilled[0], OLD)
    with pytest.raises(NoSpillLeft):
        take(spilled, limits=limits)


def test_without_spills_the_checkpoint_is_what_a_job_begins_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun = [start.source for start, _ in take((None, None), checkpoint=5)]
    assert begun == [Source(5, False)] * 2
    assert capsys.readouterr().err == "moetion-run: --load of iteration 5\n"
    assert [start.source for start, _ in take((None, None))] == [AFRESH] * 2
    assert capsys.readouterr().err == ""
    limits = (up_to(5, False), None)
    with pytest.raises(NoSpillLeft, match=r"^--load names no Megatron checkpoint: give one"):
        take((None, None), limits=limits)


@pytest.mark.parametrize(
    ("seen", "what"),
    [
        ((None, 9), "node 0 sees none and node 1 that of iteration 9"),
        ((9, 8), "node 0 sees that of iteration 9 and node 1 that of iteration 8"),
    ],
)
def test_nodes_that_see_different_checkpoints_do_not_start(
    roots: tuple[Path, Path], seen: tuple[int | None, int], what: str
) -> None:
    with pytest.raises(CheckpointsDiffer, match=f"{what}: give a folder that all nodes share"):
        take(roots, checkpoint=seen[0], seen_by_1=seen[1])


def test_where_all_start_from_a_spill_nobody_loads_one(spilled: tuple[Path, Path]) -> None:
    assert taken(spilled, checkpoint=7, seen_by_1=6) == [NEW, NEW]


def test_a_node_says_what_it_finds_on_disk(spilled: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    args = ["--load", str(tmp_path)]
    assert stored(spilled[1], 1, args) == Stored((8, 4), 7)
    assert stored(None, 1, []) == Stored()
