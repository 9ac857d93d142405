"""The agent's index outlives a worker and hands its memory on."""

import pytest

from megatron_moetion.vault.entry import Entry
from megatron_moetion.vault.store import VaultStore


def entry(key: str, chunk: int, nbytes: int = 10, offset: int = 0) -> Entry:
    return Entry(key, chunk, offset, nbytes, "0", {})


def keys(store: VaultStore, global_rank: int, prefix: str = "") -> list[str]:
    return [listing.key for listing in store.inventory(global_rank, prefix)]


@pytest.fixture
def store():
    store = VaultStore()
    yield store
    store.close()


def test_an_inventory_lists_one_rank_by_prefix(store: VaultStore) -> None:
    chunk = store.new_chunk(0, 100).number
    for key in ("frame/1/a", "batch/1/0", "frame/2/a"):
        store.publish(0, entry(key, chunk))
    assert keys(store, 0, "frame/") == ["frame/1/a", "frame/2/a"]
    assert keys(store, 1) == []


def test_drop_forgets_lower_iterations_only(store: VaultStore) -> None:
    chunk = store.new_chunk(0, 100).number
    for iteration in (9, 10, 11):
        store.publish(0, entry(f"frame/{iteration}/a", chunk))
    store.drop(0, 10)
    assert keys(store, 0) == ["frame/10/a", "frame/11/a"]
    assert store.find(0, "frame/9/a") is None


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 5), (0, 1 << 30), (1 << 20, 1)])
def test_a_region_outside_its_chunk_is_refused(store: VaultStore, offset: int, nbytes: int) -> None:
    chunk = store.new_chunk(0, 100).number
    with pytest.raises(ValueError, match="does not fit"):
        store.publish(0, entry("frame/1/a", chunk, nbytes, offset))


def test_a_chunk_of_another_rank_is_refused(store: VaultStore) -> None:
    chunk = store.new_chunk(0, 100).number
    with pytest.raises(ValueError, match="not of rank 1"):
        store.publish(1, entry("frame/1/a", chunk))


def test_a_dead_workers_entries_stay_and_its_chunks_come_back_when_dropped(
    store: VaultStore,
) -> None:
    full, empty = store.new_chunk(0, 100), store.new_chunk(0, 100)
    store.publish(0, entry("frame/1/a", full.number))
    store.orphan(0)
    assert keys(store, 0) == ["frame/1/a"]
    assert store.new_chunk(0, 100) is empty
    store.drop(0, 2)
    assert store.new_chunk(1, 100) is full
    assert store.allocated_bytes() == full.nbytes + empty.nbytes


def test_a_replacement_that_seals_the_same_key_replaces_the_entry(store: VaultStore) -> None:
    first = store.new_chunk(0, 100)
    store.publish(0, entry("frame/1/a", first.number))
    store.orphan(0)
    second = store.new_chunk(0, 100)
    store.publish(0, entry("frame/1/a", second.number))
    found = store.find(0, "frame/1/a")
    assert found is not None
    assert found[1] is second
    assert store.new_chunk(0, 100) is first


def test_a_live_workers_chunks_are_its_own_to_reuse(store: VaultStore) -> None:
    chunk = store.new_chunk(0, 100)
    store.publish(0, entry("frame/1/a", chunk.number))
    store.drop(0, 2)
    assert store.new_chunk(0, 100) is not chunk


def test_pinned_entries_are_dropped_when_they_are_released(store: VaultStore) -> None:
    chunk = store.new_chunk(0, 100).number
    for iteration in range(9, 15):
        store.publish(0, entry(f"frame/{iteration}/a", chunk))
    store.pin(0, range(10, 12))
    store.drop(0, 14)
    assert keys(store, 0) == ["frame/10/a", "frame/11/a", "frame/14/a"]
    store.unpin(0, range(9, 12))
    assert len(keys(store, 0)) == 3, "another pin was meant"
    store.unpin(0, range(10, 12))
    assert keys(store, 0) == ["frame/14/a"]


def test_a_pin_outlives_its_worker_and_what_a_replacement_drops(store: VaultStore) -> None:
    chunk = store.new_chunk(0, 100)
    store.publish(0, entry("frame/10/a", chunk.number))
    store.pin(0, range(10, 12))
    store.orphan(0)
    store.drop(0, 20)
    assert store.new_chunk(0, 100) is not chunk
    store.unpin(0, range(10, 12))
    assert store.new_chunk(0, 100) is chunk


def test_a_new_pin_takes_the_place_of_the_older_one(store: VaultStore) -> None:
    chunk = store.new_chunk(0, 100).number
    for iteration in (10, 20):
        store.publish(0, entry(f"frame/{iteration}/a", chunk))
    store.pin(0, range(10, 12))
    store.drop(0, 30)
    store.publish(0, entry("frame/20/b", chunk))
    store.pin(0, range(20, 22))
    assert keys(store, 0) == ["frame/20/b"]
