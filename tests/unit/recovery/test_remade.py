"""Ranks of stages that are rebuilt together tell each other what they have logged."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.distributed import HashStore

from megatron_moetion.inbox.key import BoundaryKey, Direction
from megatron_moetion.recovery.failure import Interrupted
from megatron_moetion.recovery.plan import Plan, StagePlan
from megatron_moetion.recovery.remade import Remade
from megatron_moetion.recovery.waiting import Wait, Waits
from megatron_moetion.topology import from_pipeline_groups
from megatron_moetion.vault import LocalVault

KEY = BoundaryKey(5, Direction.FORWARD, 0)
LINE = [(0, 1, 2)]


def remade(
    rank: int,
    store: HashStore,
    *stages: int,
    waits: Waits | None = None,
    vault: LocalVault | None = None,
) -> Remade:
    plan = Plan(1, 6, (1,), tuple(StagePlan(stage, 4, 5, (5, 6)) for stage in stages))
    topology = from_pipeline_groups(rank, LINE)
    return Remade(plan, topology, vault or LocalVault(rank), store, waits or Waits())


def test_a_wait_ends_when_the_sender_has_told() -> None:
    store = HashStore()
    sender, receiver = remade(1, store, 1, 2), remade(2, store, 1, 2)
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(receiver.wait(1, KEY)))
    waiting.start()
    sender.tell(BoundaryKey(5, Direction.FORWARD, 1))
    sender.tell(BoundaryKey(5, Direction.BACKWARD, 0))
    assert found == []
    sender.tell(KEY)
    waiting.join()
    assert found == [True]
    assert receiver.wait(1, KEY)


def test_who_is_not_rebuilt_is_not_waited_for_and_alone_nothing_is_told() -> None:
    store = HashStore()
    alone = remade(1, store, 1)
    assert not alone.wait(0, KEY)
    before = store.num_keys()
    alone.tell(KEY)
    assert store.num_keys() == before
    remade(1, store, 1, 2).tell(KEY)
    assert store.num_keys() == before + 1


def test_what_was_there_before_is_known() -> None:
    vault = LocalVault(1)
    vault.put(str(KEY), torch.zeros(1, dtype=torch.uint8), {})
    vault.put("batch/5/0/0", torch.zeros(1, dtype=torch.uint8), {})
    edges = remade(1, HashStore(), 1, vault=vault)
    assert edges.logged(KEY)
    assert not edges.logged(BoundaryKey(5, Direction.FORWARD, 1))


def test_nobody_is_told_before_everybody_can_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(LocalVault, "confirm", lambda self: order.append("confirmed"))
    monkeypatch.setattr(HashStore, "set", lambda self, key, value: order.append("told"))
    remade(1, HashStore(), 1, 2).tell(KEY)
    assert order == ["confirmed", "told"]


def test_a_wait_is_called_off_when_a_peer_is_lost() -> None:
    waits, outcome = Waits(), list[BaseException]()
    edges = remade(2, HashStore(), 1, 2, waits=waits)

    def wait() -> None:
        with pytest.raises(Interrupted) as raised:
            edges.wait(1, KEY)
        outcome.append(raised.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waits.call_off(1, Wait.CROSSING)
    waiting.join()
    assert len(outcome) == 1
