"""Frames on other nodes: copied, checked, counted, and read when the owner's copy is damaged."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moetion.agent.backlog import Sealed
from megatron_moetion.agent.replication import Replication
from megatron_moetion.agent.wire import Channel
from megatron_moetion.events import read
from megatron_moetion.faults import Fault, parse
from megatron_moetion.vault import CorruptEntry, Vault
from megatron_moetion.vault.arena import Chunk, map_shared
from megatron_moetion.vault.entry import seal
from megatron_moetion.vault.shelf import StoreShelf
from tests.agents_here import AgentsHere

NBYTES = 300_000
ROOM = 8 << 20
ENDS = [("expert.0", 100_000), ("expert.1", 200_000), ("router", NBYTES)]
Make = Callable[..., AgentsHere]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[AgentsHere] = []

    def make(
        faults: str = "", room: int = ROOM, started: bool = True, num_nodes: int = 3
    ) -> AgentsHere:
        script: tuple[Fault, ...] = parse(faults)
        made.append(AgentsHere(num_nodes, 2, script, directory=tmp_path, started=started))
        for rank in range(num_nodes):
            made[0].claim(rank, room)
        made[0].await_granted(num_nodes)
        return made[0]

    yield make
    for agents in made:
        agents.close()


def frame(iteration: int) -> torch.Tensor:
    return torch.full((NBYTES,), iteration, dtype=torch.uint8)


def put(vault: Vault, iteration: int) -> None:
    vault.reserve(f"frame/{iteration}/x", NBYTES).copy_(frame(iteration))
    vault.seal(f"frame/{iteration}/x", {"iteration": iteration}, ENDS)


def fetched(vault: Vault, global_rank: int, iteration: int) -> bool:
    found = vault.fetch(global_rank, f"frame/{iteration}/x")
    if found is not None:
        assert torch.equal(found.data, frame(iteration))
        assert found.meta == {"iteration": iteration}
    return found is not None


def held(agents: AgentsHere, node_rank: int, global_rank: int) -> list[str]:
    return [e.key for e in agents.stores[node_rank].inventory(global_rank, "")]


def test_a_sealed_frame_is_copied_and_a_dropped_one_is_dropped_everywhere(make: Make) -> None:
    agents = make()
    vault = agents.vault(0)
    for iteration in (1, 2, 3):
        put(vault, iteration)
        vault.put(f"batch/{iteration}/x", frame(0), {})
    agents.await_count(0, "durable frames", 3)
    assert [held(agents, n, 0) for n in (1, 2)] == [[f"frame/{i}/x" for i in (1, 2, 3)]] * 2
    assert agents.equipment[0].replication.durable() == {0: 3}
    assert agents.count(0, "copied bytes") == 6 * NBYTES
    # In order behind the drop, so the drop has been carried out when it is durable.
    vault.drop(3)
    put(vault, 4)
    agents.await_count(0, "durable frames", 4)
    assert [held(agents, n, 0) for n in (1, 2)] == [["frame/3/x", "frame/4/x"]] * 2
    used = agents.stores[1].allocated_bytes()
    for iteration in range(5, 20):
        vault.drop(iteration - 1)
        put(vault, iteration)
        agents.await_count(0, "durable frames", iteration)
    assert agents.stores[1].allocated_bytes() == used <= ROOM


def test_how_long_a_frame_took_is_told_once_with_its_slowest_copy(make: Make) -> None:
    agents = make("corrupt:global_rank=0,iteration=1,at=transfer,copy=2")
    vault = agents.vault(0)
    for iteration in (1, 2):
        put(vault, iteration)
    told = agents.await_replicated(2)
    agents.await_count(0, "copied frames", 4)
    assert [(t.global_rank, t.nbytes) for t in told] == [(0, NBYTES)] * 2
    assert all(t.seconds > 0 for t in told)


def test_a_header_does_not_wait_for_the_frames_before_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents, go_on, there = make(started=False), threading.Event(), threading.Semaphore(0)
    held_by, acknowledge = Replication.held, Replication.acknowledge

    def slowly(self: Replication, item: Sealed) -> Chunk | None:
        if item.entry.key.startswith("frame/"):
            assert go_on.wait(60)
        return held_by(self, item)

    def heard(self: Replication, item: Sealed, copy: int, seconds: float) -> None:
        acknowledge(self, item, copy, seconds)
        there.release()

    monkeypatch.setattr(Replication, "held", slowly)
    monkeypatch.setattr(Replication, "acknowledge", heard)
    vault = agents.vault(0)
    put(vault, 1)
    vault.put("header/2/x", frame(2), {})
    agents.start()
    assert all(there.acquire(timeout=60) for _ in range(2))
    assert [held(agents, n, 0) for n in (1, 2)] == [["header/2/x"]] * 2
    go_on.set()
    agents.await_count(0, "durable frames", 1)
    assert [held(agents, n, 0) for n in (1, 2)] == [["header/2/x", "frame/1/x"]] * 2


def test_what_is_damaged_on_its_way_is_sent_again(make: Make) -> None:
    agents = make("corrupt:global_rank=0,iteration=1,at=transfer,copy=2")
    put(agents.vault(0), 1)
    agents.await_count(0, "durable frames", 1)
    holder = agents.equipment[0].placement.holders[0][1]
    assert agents.count(0, "resent frames") == 1
    assert agents.count(holder, "frames that arrived damaged") == 1
    agents.stores[0].forget(0, "frame/1/x")
    agents.stores[agents.equipment[0].placement.holders[0][0]].forget(0, "frame/1/x")
    assert fetched(agents.vault(0), 0, 1)


@pytest.mark.parametrize("copies", [(0,), (0, 1), (1,), (0, 2), (0, 1, 2)])
def test_the_next_copy_is_read_and_damaged_ones_never_again(
    make: Make, tmp_path: Path, copies: tuple[int, ...]
) -> None:
    spec = [f"corrupt:global_rank=0,iteration=1,at=stored,copy={copy}" for copy in copies]
    agents = make(";".join(spec))
    vault = agents.vault(0)
    put(vault, 1)
    # Damage to the owner's copy is done once it is durable, to the others before.
    agents.await_count(0, "durable frames", 1)
    nodes = (0, *agents.equipment[0].placement.holders[0])
    for copy in copies:
        agents.await_count(nodes[copy], "faults", 1)
    if len(copies) < 3:
        assert fetched(vault, 0, 1)
        assert fetched(vault, 0, 1)
    else:
        with pytest.raises(CorruptEntry, match=r"frame/1/x of rank 0 is damaged: .*: expert\.0$"):
            vault.fetch(0, "frame/1/x")
        assert not fetched(vault, 0, 1)
    # A copy behind a sound one is not read.
    seen = [copy for copy in copies if set(range(copy)) <= set(copies)]
    reports = agents.await_damaged(len(seen))
    assert sorted((node, item.copy) for node, item in reports) == [(nodes[c], c) for c in seen]
    assert all(item.reason.endswith(": expert.0") for _, item in reports)
    faults = [event for event in read(tmp_path) if event["kind"] == "fault"]
    assert sorted(event["copy"] for event in faults) == sorted(copies)


def test_a_frame_that_is_damaged_before_it_is_sent_is_found_and_not_copied(make: Make) -> None:
    agents = make(started=False)
    vault = agents.vault(0)
    put(vault, 1)
    put(vault, 2)
    vault.inventory(0, "")
    found = agents.stores[0].find(0, "frame/1/x")
    assert found is not None
    entry, chunk = found
    map_shared(chunk.path, chunk.nbytes)[entry.offset + 250_000] ^= 1
    agents.start()
    ((node_rank, item),) = agents.await_damaged(1)
    assert (node_rank, item.copy, item.key) == (0, 0, "frame/1/x")
    assert item.reason.endswith(": router")
    agents.await_count(0, "durable frames", 1)
    assert [held(agents, n, 0) for n in range(3)] == [["frame/2/x"]] * 3


def test_frames_that_are_dropped_before_their_turn_are_skipped_and_said(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    agents = make(started=False)
    vault = agents.vault(0)
    for iteration in range(1, 7):
        put(vault, iteration)
    vault.drop(3)
    vault.inventory(0, "")
    assert agents.count(0, "times behind") == 1
    agents.start()
    agents.await_count(0, "durable frames", 1)
    assert [held(agents, n, 0) for n in (1, 2)] == [["frame/6/x"]] * 2
    assert agents.count(0, "skipped frames") == 2 * 5
    assert agents.equipment[0].replication.durable() == {0: 6}
    assert agents.count(0, "largest lag in frames") == 6
    kinds = [event["kind"] for event in read(tmp_path)]
    assert kinds.count("skipped") == 2
    assert kinds.count("behind") == 1
    said = capfd.readouterr().err
    assert "frame/1/x of rank 0 is not copied: it was dropped before its turn came" in said
    assert said.count("frames behind") == 1


def test_what_was_dropped_and_is_kept_for_a_spill_only_is_not_copied(make: Make) -> None:
    agents = make(started=False)
    vault = agents.vault(0)
    for iteration in (1, 2, 3):
        put(vault, iteration)
    vault.inventory(0, "")
    agents.stores[0].pin(0, range(1, 3))
    vault.drop(3)
    vault.inventory(0, "")
    agents.start()
    agents.await_count(0, "durable frames", 1)
    assert [held(agents, n, 0) for n in (1, 2)] == [["frame/3/x"]] * 2
    assert held(agents, 0, 0) == [f"frame/{i}/x" for i in (1, 2, 3)]


def test_frames_that_a_cold_start_loaded_are_copied_before_training_goes_on() -> None:
    agents = AgentsHere(2, 1)
    before = Vault(StoreShelf(agents.stores[0], 0), 0)
    for iteration in (4, 5, 6):
        put(before, iteration)
        before.put(f"batch/{iteration}/x", frame(0), {})
    agents.stores[0].orphan(0)
    for rank in (0, 1):
        agents.claim(rank, ROOM)
    agents.await_granted(2)
    agents.await_count(0, "durable frames", 3)
    assert held(agents, 1, 0) == [f"frame/{i}/x" for i in (4, 5, 6)]
    assert agents.equipment[0].replication.durable() == {0: 6}
    # They were there all at once, which is no lag.
    assert agents.count(0, "times behind") == 0
    vault = agents.vault(0)
    vault.drop(6)
    put(vault, 7)
    agents.await_count(0, "durable frames", 4)
    assert held(agents, 1, 0) == ["frame/6/x", "frame/7/x"]
    agents.close()


def test_memory_that_a_cold_start_has_filled_is_part_of_the_claim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_moetion.agent.claims.free_bytes", lambda: 3 << 20)
    agents = AgentsHere(1)
    before = Vault(StoreShelf(agents.stores[0], 0), 0)
    put(before, 4)
    held_bytes = agents.stores[0].allocated_bytes()
    agents.claim(0, (3 << 20) + held_bytes, limit=None)
    agents.await_granted(1)
    agents.close()


def test_a_holder_that_cannot_be_reached_ends_the_job_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agents = AgentsHere(2, 1)

    def refused(*_: object) -> Channel:
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(Channel, "to_peer", refused)
    agents.claim(0, ROOM)
    ((node_rank, reason),) = agents.await_refused(1)
    assert node_rank == 0
    assert "node 0 cannot reach a node that is to hold its copies" in reason
    agents.close()


def test_a_holder_takes_no_more_than_was_claimed(make: Make) -> None:
    agents = make(room=2 << 20)
    vault = agents.vault(0)
    for iteration in (1, 2, 3):
        put(vault, iteration)
    agents.await_count(0, "skipped frames", 2)
    assert [held(agents, n, 0) for n in (1, 2)] == [["frame/1/x", "frame/2/x"]] * 2
    vault.drop(2)
    put(vault, 4)
    agents.await_count(0, "durable frames", 3)
    assert agents.stores[1].allocated_bytes() == 2 << 20


def test_the_claim_counts_copies_for_others_and_waits_for_all_of_them(
    capfd: pytest.CaptureFixture[str],
) -> None:
    agents = AgentsHere(2, 1)
    agents.claim(0, 5 << 20)
    assert agents.granted == []
    agents.claim(1, 7 << 20, limit=11 << 20)
    agents.await_granted(1)
    ((node_rank, reason),) = agents.await_refused(1)
    assert agents.granted == [0]
    assert node_rank == 1
    assert "node 1: frames, logs and 5 MiB of copies for other nodes need 12 MiB" in reason
    assert "lower --moetion-replicas (without copies 7 MiB)" in reason
    rows = {line.split("  ")[0]: line.split() for line in capfd.readouterr().err.splitlines()}
    assert rows["moetion-run: for others"][-4:] == ["7", "MiB", "7", "MiB"]
    agents.close()


def test_a_node_that_is_no_owner_here_is_turned_away(make: Make) -> None:
    agents = make(num_nodes=4)
    placement = agents.equipment[0].placement
    stranger = next(n for n in range(1, 4) if placement.copy_number(n, 0) is None)
    channel = agents.channel(0)
    channel.send({"op": "copies", "node_rank": stranger, "tenure": 0})
    with pytest.raises((EOFError, OSError)):
        channel.receive()


def sender(agents: AgentsHere, holder: int, tenure: int) -> Channel:
    """An agent of node 0 that copies to a holder, with rank 0's frame 1 already there."""
    channel = agents.channel(holder)
    channel.send({"op": "copies", "node_rank": 0, "tenure": tenure})
    assert copied(channel, 1) == "stored"
    return channel


def copied(channel: Channel, iteration: int, nbytes: int = 1000) -> str:
    """Answer to a frame."""
    start_copy(channel, iteration, nbytes)
    os.write(channel._connection.fileno(), bytes(nbytes))
    return str(channel.receive()["op"])


def start_copy(channel: Channel, iteration: int, nbytes: int) -> None:
    digest, parts = seal(np.zeros(nbytes, dtype=np.uint8), ())
    head = {"op": "copy", "global_rank": 0, "key": f"frame/{iteration}/x", "nbytes": nbytes}
    channel.send({**head, "checksum": digest, "meta": {}, "parts": parts})


@pytest.mark.parametrize("how", ["evicted", "followed"])
def test_what_an_agent_sends_that_has_lost_its_place_changes_nothing(make: Make, how: str) -> None:
    agents = make()
    holder = agents.equipment[0].placement.holders[0][0]
    stale, between = sender(agents, holder, tenure=0), sender(agents, holder, tenure=0)
    # One of its frames is on its way at that moment.
    start_copy(between, 2, 1000)
    if how == "evicted":
        agents.equipment[holder].evicted(0, 1)
    else:
        # The agent after it may be quicker than the leader's word.
        assert copied(sender(agents, holder, tenure=1), 7) == "stored"
    before = held(agents, holder, 0)
    for channel, says in (
        (stale, {"op": "drop", "global_rank": 0, "below": 100}),
        (stale, {"op": "forget", "global_rank": 0, "key": "frame/1/x"}),
    ):
        with contextlib.suppress(OSError):
            channel.send(says)
    with contextlib.suppress(OSError):
        os.write(between._connection.fileno(), bytes(1000))
    with pytest.raises((EOFError, OSError)):
        between.receive()
    # Nor does it open another connection.
    late = agents.channel(holder)
    late.send({"op": "copies", "node_rank": 0, "tenure": 0})
    with pytest.raises((EOFError, OSError)):
        copied(late, 9)
    assert held(agents, holder, 0) == before
    assert agents.count(holder, "messages of agents that had lost their place") == 1
    # What comes from whoever has the place now counts.
    current = sender(agents, holder, tenure=1)
    assert copied(current, 8) == "stored"
    assert held(agents, holder, 0)[-1] == "frame/8/x"
