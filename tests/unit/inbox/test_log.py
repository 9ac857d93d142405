"""The log gives back what was written, from whichever rank has it."""

from __future__ import annotations

import pytest
import torch

from megatron_moetion.inbox.key import (
    BatchKey,
    BoundaryKey,
    CollectiveKey,
    Direction,
    FrameKey,
    HeaderKey,
    Key,
    ResultKey,
    iteration_of,
)
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.snapshot.bundle import Unsupported
from megatron_moetion.vault import CorruptEntry, Fetched, LocalVault, Unreachable
from megatron_moetion.vault.entry import split_key

KEYS: list[tuple[Key, str]] = [
    (BoundaryKey(7, Direction.FORWARD, 2), "boundary/7/forward/2"),
    (CollectiveKey(7, "g3", 1), "collective/7/g3/1"),
    (BatchKey(7, 0, 3), "batch/7/0/3"),
    (HeaderKey(7), "header/7/start"),
    (ResultKey(7), "result/7/end"),
    (FrameKey(7), "frame/7/state"),
]


@pytest.mark.parametrize(("key", "text"), KEYS, ids=[text for _, text in KEYS])
def test_keys_have_a_text_form_that_the_vault_understands(key: Key, text: str) -> None:
    assert str(key) == text
    assert iteration_of(text) == 7
    assert split_key(text) == (text.split("/")[0], 7)


@pytest.fixture
def log() -> InboxLog:
    return InboxLog(LocalVault(0), 0)


def test_tensors_come_back_as_fresh_copies(log: InboxLog) -> None:
    source = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    log.write(KEYS[0][0], [source, torch.empty(0)])
    with torch.no_grad():
        source.zero_()
    first, second = (log.read(KEYS[0][0], [0]) for _ in range(2))
    assert first is not None
    assert second is not None
    first[0].fill_(5)
    assert second[0].tolist() == [1, 1, 1]
    assert not second[0].requires_grad
    assert second[1].shape == (0,)


def test_nothing_but_an_absent_entry_reads_as_none(log: InboxLog) -> None:
    assert log.read_state(HeaderKey(1)) is None
    assert log.read(BatchKey(1, 0, 0), [3, 0]) is None
    log.write_state(HeaderKey(1), {})
    assert log.read_state(HeaderKey(1)) == {}


class Partly(LocalVault):
    """A vault of which other ranks' entries raise what is in `of`, unless they are there."""

    def __init__(self) -> None:
        super().__init__(0)
        self.of: dict[int, Exception] = {}

    def fetch(self, global_rank: int, key: str) -> Fetched | None:
        if global_rank in self.of:
            raise self.of[global_rank]
        return super().fetch(0, key) if global_rank == 3 else None


@pytest.mark.parametrize(
    "error", [Unreachable("node 1 is gone"), CorruptEntry(1, "result/7/end", "bits differ")]
)
def test_another_rank_is_asked_before_it_counts_that_one_cannot_be(error: Exception) -> None:
    vault = Partly()
    vault.of[1] = error
    log = InboxLog(vault, 0)
    log.write_state(ResultKey(7), {"loss": 1.5})
    assert log.read_state(ResultKey(7), [1, 2, 3]) == {"loss": 1.5}
    with pytest.raises(type(error)):
        log.read_state(ResultKey(7), [1, 2])
    # What is damaged stays so; who cannot be asked may be replaced.
    vault.of[2], vault.of[0] = Unreachable("node 2 is gone"), CorruptEntry(0, "result/7/end", "no")
    with pytest.raises(Unreachable, match="node 2"):
        log.read_state(ResultKey(7), [1, 2, 0])
    del vault.of[2]
    assert log.read_state(ResultKey(7), [2]) is None


def test_state_without_tensors_is_logged_too_and_a_newer_one_replaces_it(log: InboxLog) -> None:
    log.write_state(HeaderKey(1), {"lr": 0.1})
    log.write_state(HeaderKey(1), {"lr": 0.2})
    assert log.read_state(HeaderKey(1)) == {"lr": 0.2}


def test_what_cannot_be_logged_is_refused_and_leaves_the_older_entry(log: InboxLog) -> None:
    log.write_state(HeaderKey(1), 1)
    with pytest.raises(Unsupported, match=r"\.f is a function"):
        log.write_state(HeaderKey(1), {"f": lambda: None})
    assert log.read_state(HeaderKey(1)) == 1
