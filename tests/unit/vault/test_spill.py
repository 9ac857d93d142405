"""A spill is all that was sealed, or it does not exist; what is read back is what was written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_moetion.vault import Vault, spill
from megatron_moetion.vault.shelf import StoreShelf
from megatron_moetion.vault.spill import DamagedSpill, Record, Span, SpillError
from megatron_moetion.vault.store import VaultStore

SPAN = Span(base=4, iteration=6)
LAYOUT = ((0, 1), (2,))
NAME = spill.name_of(6, "job")
FRAME_BYTES = 3000


def data_of(global_rank: int, key: str, nbytes: int) -> torch.Tensor:
    seed = sum(key.encode()) * 31 + global_rank
    return (torch.arange(nbytes) * seed % 251).to(torch.uint8)


def fill(store: VaultStore, global_rank: int) -> None:
    """What a rank holds in iteration 8, some of it beyond the span on both sides."""
    vault = Vault(StoreShelf(store, global_rank), global_rank)
    for i in range(2, 9):
        keys = {f"frame/{i}/state": FRAME_BYTES, f"header/{i}/start": 64, f"result/{i}/end": 7}
        keys |= {f"batch/{i}/0/{m}": 40 + m for m in range(2)} | {f"boundary/{i}/forward/0": 0}
        for key, nbytes in keys.items():
            vault.put(key, data_of(global_rank, key, nbytes), {"of": key})


def spilled(root: Path) -> Record:
    store = VaultStore()
    for rank in LAYOUT[0]:
        fill(store, rank)
    record = spill.write(root, store, NAME, SPAN, 0, LAYOUT, {"num_layers": "2"})
    store.close()
    return record


def test_what_is_loaded_is_what_was_spilled(tmp_path: Path) -> None:
    record = spilled(tmp_path)
    assert spill.names(tmp_path, 0) == [NAME]
    assert spill.names(tmp_path, 1) == []
    assert spill.read_record(tmp_path, NAME, 0) == record
    store = VaultStore()
    spill.load(tmp_path, record, store)
    for rank in LAYOUT[0]:
        reader = Vault(StoreShelf(store, 9), 9)
        listed = {listing.key for listing in reader.inventory(rank, "")}
        frames = {f"frame/{i}/state" for i in (4, 5, 6)}
        headers = {f"header/{i}/start" for i in (5, 6, 7)}
        inbox = {
            f"{rest}" for i in (5, 6)
            for rest in (f"result/{i}/end", f"batch/{i}/0/0", f"batch/{i}/0/1",
                         f"boundary/{i}/forward/0")
        }  # fmt: skip
        assert listed == frames | headers | inbox
        for key in listed:
            fetched = reader.fetch(rank, key)
            assert fetched is not None
            assert torch.equal(fetched.data, data_of(rank, key, fetched.data.numel()))
            assert fetched.meta == {"of": key}


def test_a_damaged_frame_is_named_by_its_operators_in_memory_and_on_disk(tmp_path: Path) -> None:
    store, key = VaultStore(), "frame/5/state"
    for rank in LAYOUT[0]:
        fill(store, rank)
        vault = Vault(StoreShelf(store, rank), rank)
        region = vault.reserve(key, FRAME_BYTES)
        vault.seal(key, {}, [("expert.0", 1000), ("router", FRAME_BYTES)])
    spill.write(tmp_path, store, NAME, SPAN, 0, LAYOUT, {})
    record = spill.read_record(tmp_path, NAME, 0)
    loaded = VaultStore()
    spill.load(tmp_path, record, loaded)
    reader = Vault(StoreShelf(loaded, 9), 9)
    assert reader.fetch(1, key) is not None
    region[1500] ^= 1
    with pytest.raises(SpillError, match=rf"{key} of rank 1 is damaged: .*: router$"):
        spill.write(tmp_path, store, spill.name_of(9, "job"), SPAN, 0, LAYOUT, {})
    path = tmp_path / NAME / "rank1.safetensors"
    content = bytearray(path.read_bytes())
    (item,) = [i for i in record.items if (i.global_rank, i.key) == (1, key)]
    header = 8 + int.from_bytes(content[:8], "little")
    start = json.loads(content[8:header])[key]["data_offsets"][0]
    content[header + start] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedSpill, match=rf"{key} does not match its checksum: .*: expert\.0$"):
        spill.load(tmp_path, record, VaultStore())
    assert item.parts[0][:2] == ("expert.0", 1000)


def test_the_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    spilled(tmp_path)
    tensors = load_file(tmp_path / NAME / "rank1.safetensors")
    key = "frame/5/state"
    assert torch.equal(tensors[key], data_of(1, key, FRAME_BYTES))


def test_loaded_memory_comes_back_when_its_entries_are_dropped(tmp_path: Path) -> None:
    record = spilled(tmp_path)
    store = VaultStore()
    spill.load(tmp_path, record, store)
    allocated = store.allocated_bytes()
    store.drop(0, 100)
    for _ in range(3):
        store.new_chunk(0, FRAME_BYTES)
    assert store.allocated_bytes() == allocated


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_change_of_any_byte_is_overlooked(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("spill")
    before = spilled(root)
    files = ["node0.json", "rank0.safetensors", "rank1.safetensors"]
    path = root / NAME / data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    store, damage = VaultStore(), ""
    try:
        record = spill.read_record(root, NAME, 0)
        spill.load(root, record, store)
    except DamagedSpill as error:
        damage = str(error)
    if damage:
        assert str(path) in damage
        assert [store.inventory(rank, "") for rank in LAYOUT[0]] == [[], []]
        return
    # White space of a file's head: nothing that is read has changed.
    assert record == before
    for item in record.items:
        found = store.find(item.global_rank, item.key)
        assert found is not None
        assert found[0].checksum == item.checksum


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    record = spilled(tmp_path)
    (tmp_path / NAME / "rank1.safetensors").unlink()
    with pytest.raises(DamagedSpill, match=r"rank1\.safetensors"):
        spill.load(tmp_path, record, VaultStore())


def test_a_spill_of_another_format_is_not_read(tmp_path: Path) -> None:
    spilled(tmp_path)
    path = tmp_path / NAME / "node0.json"
    data = json.loads(path.read_text())
    data["record"]["format"] = spill.FORMAT + 1
    data["checksum"] = spill._body_checksum(data["record"])
    path.write_text(json.dumps(data))
    with pytest.raises(DamagedSpill, match="format 2, this version reads 1"):
        spill.read_record(tmp_path, NAME, 0)


def test_without_an_entry_that_every_rank_has_there_is_no_spill(tmp_path: Path) -> None:
    store = VaultStore()
    for rank in LAYOUT[0]:
        fill(store, rank)
    store.forget(1, "header/7/start")
    with pytest.raises(SpillError, match="rank 1 has no sealed header of iteration 7"):
        spill.write(tmp_path, store, NAME, SPAN, 0, LAYOUT, {})
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_is_damaged_in_memory_is_not_spilled(tmp_path: Path) -> None:
    store = VaultStore()
    for rank in LAYOUT[0]:
        fill(store, rank)
    found = store.find(1, "frame/5/state")
    assert found is not None
    entry, chunk = found
    with open(chunk.path, "r+b") as memory:
        memory.seek(entry.offset)
        memory.write(b"\xff\xfe")
    with pytest.raises(SpillError, match="frame/5/state of rank 1 is damaged"):
        spill.write(tmp_path, store, NAME, SPAN, 0, LAYOUT, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_an_error_and_stays(tmp_path: Path) -> None:
    root = tmp_path / "spill"
    root.write_text("mine")
    with pytest.raises(OSError, match="spill"):
        spilled(root)
    assert root.read_text() == "mine"


FULL_DISK = """
import resource, sys
from pathlib import Path
from megatron_moetion.vault import spill
from megatron_moetion.vault.store import VaultStore
import test_spill as t
store, root = VaultStore(), Path(sys.argv[1])
for rank in t.LAYOUT[0]:
    t.fill(store, rank)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    spill.write(root, store, spill.name_of(9, "job"), t.SPAN, 0, t.LAYOUT, {})
except OSError as error:
    sys.exit(f"refused: {error.strerror}")
"""


@pytest.mark.parametrize("limit_bytes", [0, 100, 5000])
def test_a_full_disk_leaves_the_previous_spill_alone(tmp_path: Path, limit_bytes: int) -> None:
    record = spilled(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit_bytes)],
        env={"PYTHONPATH": ":".join([*sys.path, str(Path(__file__).parent)])},
        capture_output=True,
        text=True,
    )
    assert "refused: File too large" in child.stderr, child.stderr
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    spill.load(tmp_path, record, VaultStore())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_part_without_its_record_does_not_exist_and_goes_with_the_old_ones(
    tmp_path: Path,
) -> None:
    spilled(tmp_path)
    torn = tmp_path / spill.name_of(9, "job")
    torn.mkdir()
    (torn / "rank0.safetensors").write_bytes(b"half")
    (torn / "node0.draft").write_bytes(b"{")
    assert spill.names(tmp_path, 0) == [NAME]
    spill.prune(tmp_path, [NAME], 0, LAYOUT[0])
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_pruning_leaves_the_parts_of_other_nodes(tmp_path: Path) -> None:
    spilled(tmp_path)
    others = tmp_path / NAME / "node1.json"
    others.write_text("{}")
    spill.prune(tmp_path, [], 0, LAYOUT[0])
    assert list((tmp_path / NAME).iterdir()) == [others]


def test_names_sort_by_iteration() -> None:
    names = [spill.name_of(i, "abc") for i in (2, 10, 100_000)]
    assert sorted(names) == names
    assert [spill.iteration_of(name) for name in names] == [2, 10, 100_000]
