"""A node writes in the background, says how it went, and keeps no more than two valid spills."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_moetion.agent.membership import Member, Members
from megatron_moetion.agent.spiller import Spiller, Written
from megatron_moetion.vault import Vault, spill
from megatron_moetion.vault.shelf import StoreShelf
from megatron_moetion.vault.spill import Span
from megatron_moetion.vault.store import VaultStore

MEMBERS = Members((Member(0, "a", 1, 1),), 0)
SPANS = [Span(i - 1, i) for i in (2, 4, 6, 8)]


@pytest.fixture
def store() -> Iterator[VaultStore]:
    store = VaultStore()
    vault = Vault(StoreShelf(store, 0), 0)
    for kind in ("frame", "header", "result"):
        for i in range(1, 10):
            vault.put(f"{kind}/{i}/x", torch.full((20,), i, dtype=torch.uint8), {})
    yield store
    store.close()


def run(
    root: Path, store: VaultStore, spans: list[Span], valid: bool = True, started: str | None = None
) -> list[Written]:
    outcomes: queue.SimpleQueue[Written] = queue.SimpleQueue()
    spiller = Spiller(root, MEMBERS, store, "job", started, outcomes.put)
    done = []
    for span in spans:
        spiller.write(span, {"lr": "1"})
        done.append(outcomes.get(timeout=60))
        spiller.settle(span, valid)
    # Done in the order in which it is given, so this one is after everything else.
    spiller.write(Span(90, 99), {})
    assert outcomes.get(timeout=60).error
    return done


def there(root: Path) -> list[int]:
    return sorted(spill.iteration_of(name) for name in spill.names(root, 0))


def test_the_newest_two_stay(tmp_path: Path, store: VaultStore) -> None:
    done = run(tmp_path, store, SPANS)
    assert [(w.span, w.error) for w in done] == [(span, "") for span in SPANS]
    assert all(w.nbytes == 20 * (2 + 2 + 1) for w in done)
    assert there(tmp_path) == [6, 8]
    assert spill.read_record(tmp_path, spill.name_of(8, "job"), 0).identity == {"lr": "1"}


def test_a_part_of_a_spill_that_failed_elsewhere_goes(tmp_path: Path, store: VaultStore) -> None:
    run(tmp_path, store, SPANS[:2])
    (written,) = run(tmp_path, store, SPANS[2:3], valid=False)
    assert written.error == ""
    assert there(tmp_path) == [2, 4]


def test_the_spill_that_the_job_started_from_is_one_of_those_that_stay(
    tmp_path: Path, store: VaultStore
) -> None:
    older, newer = (tmp_path / spill.name_of(i, "before") for i in (1, 3))
    for folder in (older, newer):
        folder.mkdir()
        (folder / "node0.json").touch()
    run(tmp_path, store, SPANS[1:2], started=newer.name)
    assert there(tmp_path) == [3, 4]


def test_an_error_is_told_and_not_raised(tmp_path: Path, store: VaultStore) -> None:
    (tmp_path / "spill").touch()
    (written,) = run(tmp_path / "spill", store, SPANS[:1], valid=False)
    assert "Not a directory" in written.error
