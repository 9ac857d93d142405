"""One suite for every vault: in this process, through an agent, and read from another node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_moetion.vault import CorruptEntry, LocalVault, Vault
from megatron_moetion.vault.shelf import StoreShelf
from megatron_moetion.vault.store import VaultStore
from tests.agents_here import AgentsHere

RANK = 0
Connect = Callable[[int], Vault]


@pytest.fixture
def two_nodes() -> Iterator[AgentsHere]:
    nodes = AgentsHere(2)
    yield nodes
    nodes.close()


@pytest.fixture(params=["local", "agent", "other node"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Vault, Vault]]:
    """(vault that writes rank 0's entries, vault that reads them)."""
    if request.param == "local":
        vault: Vault = LocalVault(RANK)
        yield vault, vault
        return
    nodes = AgentsHere(2)
    writer = nodes.vault(0)
    yield writer, writer if request.param == "agent" else nodes.vault(1)
    nodes.close()


def pattern(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.arange(seed, seed + nbytes).to(torch.uint8)


def settle(vault: Vault) -> None:
    """What was sealed can be read, and one-way messages before it have been handled."""
    vault.confirm()


@pytest.mark.parametrize("nbytes", [0, 1, 4097, 5_000_000])
def test_what_was_put_is_fetched(pair: tuple[Vault, Vault], nbytes: int) -> None:
    writer, reader = pair
    data = pattern(nbytes)
    writer.put("frame/3/a", data, {"step": 3, "name": "x"})
    settle(writer)
    fetched = reader.fetch(RANK, "frame/3/a")
    assert fetched is not None
    assert torch.equal(fetched.data, data)
    assert fetched.meta == {"step": 3, "name": "x"}


def test_a_region_is_not_there_before_it_is_sealed(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    writer.reserve("boundary/1/0", 100).fill_(1)
    settle(writer)
    assert reader.fetch(RANK, "boundary/1/0") is None
    writer.seal("boundary/1/0", {})
    settle(writer)
    assert reader.fetch(RANK, "boundary/1/0") is not None


def test_regions_are_aligned_and_do_not_overlap(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    for index in range(50):
        region = writer.reserve(f"boundary/1/{index}", 100 + index)
        assert region.data_ptr() % 64 == 0
        region.fill_(index)
        writer.seal(f"boundary/1/{index}", {})
    settle(writer)
    for index in range(50):
        fetched = reader.fetch(RANK, f"boundary/1/{index}")
        assert fetched is not None
        assert fetched.data.tolist() == [index] * (100 + index)


def test_a_missing_entry_is_none(pair: tuple[Vault, Vault]) -> None:
    assert pair[1].fetch(RANK, "frame/1/a") is None


def test_an_inventory_lists_sealed_entries_by_prefix(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    writer.put("frame/1/a", pattern(3), {"n": 1})
    writer.put("batch/1/a", pattern(4), {})
    writer.reserve("frame/2/a", 5)
    settle(writer)
    (listing,) = reader.inventory(RANK, "frame/")
    assert (listing.key, listing.nbytes, listing.meta) == ("frame/1/a", 3, {"n": 1})


def test_damage_is_found_and_named(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    region = writer.reserve("frame/7/a", 1000)
    region.fill_(1)
    writer.seal("frame/7/a", {})
    region[500] = 2
    settle(writer)
    with pytest.raises(CorruptEntry, match="frame/7/a of rank 0"):
        reader.fetch(RANK, "frame/7/a")


def test_what_is_not_trusted_is_never_read_again_however_sound(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    for iteration in (1, 2):
        writer.put(f"frame/{iteration}/a", torch.zeros(8, dtype=torch.uint8), {})
    writer.confirm()
    with pytest.raises(CorruptEntry, match="frame/1/a of rank 0 is damaged: not finite"):
        reader.distrust(0, "frame/1/a", "not finite")
    assert reader.fetch(0, "frame/1/a") is None
    assert [entry.key for entry in reader.inventory(0, "frame/")] == ["frame/2/a"]


def test_writing_to_what_was_fetched_never_reaches_the_vault(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    writer.put("frame/1/a", pattern(100), {})
    settle(writer)
    fetched = reader.fetch(RANK, "frame/1/a")
    assert fetched is not None
    fetched.data.fill_(0)
    again = reader.fetch(RANK, "frame/1/a")
    assert again is not None
    assert torch.equal(again.data, pattern(100))


def test_sealing_a_key_again_replaces_the_entry(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    writer.put("batch/4/0", pattern(10), {"try": 1})
    writer.put("batch/4/0", pattern(20, seed=5), {"try": 2})
    settle(writer)
    fetched = reader.fetch(RANK, "batch/4/0")
    assert fetched is not None
    assert torch.equal(fetched.data, pattern(20, seed=5))
    assert fetched.meta == {"try": 2}
    assert writer.usage().num_entries == 1


def test_drop_forgets_what_is_below(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    for iteration in (8, 9, 10):
        writer.put(f"frame/{iteration}/a", pattern(10), {})
        writer.put(f"header/{iteration}/a", pattern(10), {})
    writer.drop(10)
    settle(writer)
    assert [entry.key for entry in reader.inventory(RANK, "")] == ["frame/10/a", "header/10/a"]
    assert reader.fetch(RANK, "frame/9/a") is None


def test_memory_does_not_grow_once_warm(pair: tuple[Vault, Vault]) -> None:
    writer, _ = pair
    used = []
    for iteration in range(60):
        writer.put(f"frame/{iteration}/a", pattern(1_500_000), {})
        for microbatch in range(20):
            writer.put(f"boundary/{iteration}/{microbatch}", pattern(100_000), {})
        writer.drop(iteration - 3)
        used.append(writer.usage())
    assert used[-1] == used[5]
    assert used[-1].used_bytes == 4 * (1_500_000 + 20 * 100_000)


def test_an_iteration_that_is_aborted_and_run_again_leaks_nothing(
    pair: tuple[Vault, Vault],
) -> None:
    writer, _ = pair
    for iteration in range(20):
        for _ in range(3):
            writer.reserve(f"boundary/{iteration}/0", 10).fill_(0)
            writer.reserve(f"frame/{iteration}/0", 10).fill_(0)
            writer.abandon()
        writer.put(f"boundary/{iteration}/0", pattern(10), {})
        writer.drop(iteration)
    assert writer.usage().num_entries == 1
    assert writer.usage().num_chunks <= 3


def test_a_region_below_the_drop_line_is_forgotten_when_it_is_sealed(
    pair: tuple[Vault, Vault],
) -> None:
    writer, reader = pair
    writer.reserve("frame/1/a", 10).fill_(0)
    writer.drop(5)
    writer.seal("frame/1/a", {})
    settle(writer)
    assert reader.fetch(RANK, "frame/1/a") is None
    assert writer.usage().used_bytes == 0


def test_a_key_cannot_be_written_twice_at_once(pair: tuple[Vault, Vault]) -> None:
    writer, _ = pair
    writer.reserve("frame/1/a", 10)
    with pytest.raises(ValueError, match="already being written"):
        writer.reserve("frame/1/a", 10)


def test_sealing_what_was_not_reserved_is_an_error(pair: tuple[Vault, Vault]) -> None:
    with pytest.raises(KeyError):
        pair[0].seal("frame/1/a", {})


def test_many_threads_may_write_and_read(pair: tuple[Vault, Vault]) -> None:
    writer, reader = pair
    barrier = threading.Barrier(6)

    def work(thread: int) -> None:
        barrier.wait()
        for index in range(40):
            key = f"boundary/{index}/{thread}"
            writer.put(key, pattern(1000, seed=thread), {})
            settle(writer)
            fetched = reader.fetch(RANK, key)
            assert fetched is not None
            assert torch.equal(fetched.data, pattern(1000, seed=thread))

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, thread) for thread in range(6)]:
            future.result()
    assert writer.usage().num_entries == 240


def test_each_chunk_is_announced_once_when_it_is_mapped() -> None:
    mapped: list[int] = []
    vault = LocalVault(RANK, on_map=lambda chunk: mapped.append(chunk.numel()))
    for iteration in range(5):
        vault.put(f"frame/{iteration}/a", pattern(10), {})
        vault.drop(iteration)
    assert len(mapped) == vault.usage().num_chunks == 2


def test_the_entries_of_a_dead_worker_serve_its_replacement(two_nodes: AgentsHere) -> None:
    dead = two_nodes.vault(0)
    dead.put("frame/1/a", pattern(100), {})
    dead.reserve("frame/2/a", 100)
    settle(dead)
    two_nodes.links[0].close()
    two_nodes.stores[0].orphan(0)
    replacement = two_nodes.vault(0)
    assert [entry.key for entry in replacement.inventory(0, "")] == ["frame/1/a"]
    fetched = replacement.fetch(0, "frame/1/a")
    assert fetched is not None
    assert torch.equal(fetched.data, pattern(100))
    allocated = two_nodes.stores[0].allocated_bytes()
    replacement.drop(2)
    settle(replacement)
    for iteration in (3, 4):
        replacement.put(f"frame/{iteration}/a", pattern(100), {})
    settle(replacement)
    assert two_nodes.stores[0].allocated_bytes() == allocated


def test_a_bad_message_is_refused_with_its_reason(two_nodes: AgentsHere) -> None:
    two_nodes.vault(0)
    with pytest.raises(RuntimeError, match="global rank 7 is not one of 2"):
        two_nodes.links[0].request({"op": "fetch", "global_rank": 7, "key": "frame/1/a"})


def test_what_is_kept_is_neither_dropped_nor_overwritten_until_it_is_released(
    pair: tuple[Vault, Vault],
) -> None:
    writer, _ = pair
    views = {}
    for iteration in range(1, 7):
        key = f"frame/{iteration}/a"
        views[iteration] = writer.reserve(key, 100)
        views[iteration].fill_(iteration)
        writer.seal(key, {})
    assert writer.keep(range(2, 4))
    assert not writer.keep(range(4, 6)), "one stretch at a time"
    writer.drop(6)
    reused = [writer.reserve(f"frame/{i}/b", 100).fill_(99) for i in range(7, 10)]
    assert [int(views[i][0]) for i in (2, 3)] == [2, 3]
    writer.release(range(1, 3))
    writer.release(range(2, 4))
    writer.drop(6)
    reused += [writer.reserve(f"frame/{i}/b", 100).fill_(99) for i in range(10, 12)]
    assert [int(views[i][0]) for i in (2, 3)] == [99, 99]
    assert writer.keep(range(4, 6))


def test_a_notice_can_release_while_the_vault_waits_for_memory() -> None:
    class Slow(StoreShelf):
        def chunk(self, nbytes: int) -> tuple[int, str, int]:
            notice = threading.Thread(target=vault.release, args=(range(1, 2),), daemon=True)
            notice.start()
            notice.join(timeout=30)
            assert not notice.is_alive(), "the notice waits for the vault, which waits for it"
            return super().chunk(nbytes)

    store = VaultStore()
    vault = Vault(Slow(store, RANK), RANK)
    assert vault.keep(range(1, 2))
    vault.put("frame/1/a", pattern(10), {})
    store.close()
