"""Spilled windows: all that a rebuild needs, as files that survive the loss of every agent.

A spill is a folder `<iteration>-<job>`. Each node writes one safetensors file for each of its ranks
and then its record, a JSON file that is renamed into place last. A part without a record does not
exist; a spill exists when every node's part does, which the agents find out together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_moetion.vault.arena import align, map_private, map_shared
from megatron_moetion.vault.entry import Entry, Parts, checksum, damage, split_key
from megatron_moetion.vault.store import VaultStore

FOLDER = "spill"
FORMAT = 1
_HEADER_ALIGNMENT_BYTES = 8


class SpillError(RuntimeError):
    """What is to be spilled is not all there, or not what was sealed."""


class DamagedSpill(RuntimeError):
    """A spill is not what was written; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class Span:
    """Which iterations a spill is made of.

    Attributes:
        base: its frame starts the reconstruction.
        iteration: the state after its optimizer step is what is rebuilt.
    """

    base: int
    iteration: int

    @property
    def last(self) -> int:
        """The iteration that training goes on with; of it only the start is needed."""
        return self.iteration + 1

    @property
    def iterations(self) -> range:
        """Those of all entries."""
        return range(self.base, self.last + 1)

    def holds(self, key: str) -> bool:
        """Whether an entry belongs into the spill."""
        kind, iteration = split_key(key)
        if kind == "frame":
            return self.base <= iteration <= self.iteration
        return self.base < iteration <= (self.last if kind == "header" else self.iteration)

    @property
    def required(self) -> frozenset[tuple[str, int]]:
        """(kind, iteration) of entries that every rank has; what else there is depends on its
        stage.
        """
        frames = {("frame", i) for i in range(self.base, self.iteration + 1)}
        headers = {("header", i) for i in range(self.base + 1, self.last + 1)}
        results = {("result", i) for i in range(self.base + 1, self.iteration + 1)}
        return frozenset(frames | headers | results)


@dataclass(frozen=True)
class Item:
    """One entry of a spill; fields as in `Entry`."""

    global_rank: int
    key: str
    nbytes: int
    checksum: str
    meta: Mapping[str, Any]
    parts: Parts = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Item:
        """Inverse of `asdict`."""
        return cls(**{**data, "parts": tuple(tuple(part) for part in data["parts"])})


@dataclass(frozen=True)
class Record:
    """What a node writes last of its part.

    Attributes:
        name: of the spill's folder.
        span: iterations.
        node_rank: whose part this is.
        layout: global ranks per node rank.
        identity: flags and versions that a run must share to go on from here, by name.
        items: all entries.
    """

    name: str
    span: Span
    node_rank: int
    layout: tuple[tuple[int, ...], ...]
    identity: Mapping[str, str]
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(item.nbytes for item in self.items)

    def to_json(self) -> dict[str, Any]:
        """For the record's file."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Inverse of `to_json`.

        Raises:
            ValueError: of another format.
        """
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
        return cls(
            name=data["name"],
            span=Span(**data["span"]),
            node_rank=data["node_rank"],
            layout=tuple(tuple(ranks) for ranks in data["layout"]),
            identity=data["identity"],
            items=tuple(Item.from_json(item) for item in data["items"]),
        )


def name_of(iteration: int, job: str) -> str:
    """A spill's folder; names sort by iteration."""
    return f"{iteration:010d}-{job}"


def iteration_of(name: str) -> int:
    """Inverse of `name_of`."""
    return int(name.partition("-")[0])


def write(
    root: Path,
    store: VaultStore,
    name: str,
    span: Span,
    node_rank: int,
    layout: tuple[tuple[int, ...], ...],
    identity: Mapping[str, str],
) -> Record:
    """Writes this node's part, its record last. What was written before an error is removed.

    Args:
        root: folder of all spills.
        store: keeps the span's entries until this returns (see `VaultStore.pin`).

    Raises:
        SpillError: an entry is missing or damaged.
        OSError: no space, no permission, ...
    """
    folder = root / name
    items: list[Item] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank in layout[node_rank]:
            items += _write_rank(folder, store, rank, span)
        _sync_folder(folder)
        record = Record(name, span, node_rank, layout, identity, tuple(items))
        _write_record(folder, record)
        _sync_folder(root)
    except (OSError, SpillError):
        discard(root, name, node_rank, layout[node_rank])
        raise
    return record


def _write_rank(folder: Path, store: VaultStore, global_rank: int, span: Span) -> list[Item]:
    keys = [listing.key for listing in store.inventory(global_rank, "") if span.holds(listing.key)]
    missing = span.required - {split_key(key) for key in keys}
    if missing:
        kind, iteration = min(missing, key=lambda entry: entry[1])
        raise SpillError(f"rank {global_rank} has no sealed {kind} of iteration {iteration}")
    found = [store.find(global_rank, key) for key in keys]
    places = [place for place in found if place is not None]
    for entry, chunk in places:
        data = map_private(chunk.path, entry.offset, entry.nbytes)
        reason = damage(data.numpy(), entry.checksum, entry.parts)
        if reason is not None:
            where = f"vault entry {entry.key} of rank {global_rank}"
            raise SpillError(f"{where} is damaged: {reason}")
    # The library would copy everything first; the kernel copies from memory to file by itself.
    with _rank_file(folder, global_rank).open("wb", buffering=0) as file:
        file.write(_header([entry for entry, _ in places]))
        for entry, chunk in places:
            _copy(file.fileno(), chunk.fd, entry.offset, entry.nbytes)
        os.fsync(file.fileno())
    return [Item(global_rank, e.key, e.nbytes, e.checksum, e.meta, e.parts) for e, _ in places]


def _header(entries: Sequence[Entry]) -> bytes:
    """The head of a safetensors file whose tensors are the entries' bytes, in this order."""
    tensors, end = {}, 0
    for entry in entries:
        offsets = [end, end + entry.nbytes]
        tensors[entry.key] = {"dtype": "U8", "shape": [entry.nbytes], "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _copy(to_fd: int, from_fd: int, offset: int, nbytes: int) -> None:
    while nbytes:
        count = os.sendfile(to_fd, from_fd, offset, nbytes)
        if count == 0:
            raise SpillError("a chunk of the vault ended before its entry did")
        offset += count
        nbytes -= count


def _write_record(folder: Path, record: Record) -> None:
    body = record.to_json()
    path = _record_file(folder, record.node_rank)
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(json.dumps({"checksum": _body_checksum(body), "record": body}).encode())
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    _sync_folder(folder)


def _body_checksum(body: Mapping[str, Any]) -> str:
    return checksum(json.dumps(body, sort_keys=True).encode())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _record_file(folder: Path, node_rank: int) -> Path:
    return folder / f"node{node_rank}.json"


def _rank_file(folder: Path, global_rank: int) -> Path:
    return folder / f"rank{global_rank}.safetensors"


def names(root: Path, node_rank: int) -> list[str]:
    """Spills of which this node's part has its record, newest first."""
    return sorted((p.parent.name for p in root.glob(f"*-*/node{node_rank}.json")), reverse=True)


def read_record(root: Path, name: str, node_rank: int) -> Record:
    """This node's record of a spill.

    Raises:
        DamagedSpill: it is not what was written.
    """
    path = _record_file(root / name, node_rank)
    try:
        data = json.loads(path.read_bytes())
        if _body_checksum(data["record"]) != data["checksum"]:
            raise ValueError("it does not match its checksum")
        return Record.from_json(data["record"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedSpill(f"{path} cannot be read: {error}") from None


def load(root: Path, record: Record, store: VaultStore) -> None:
    """Puts this node's entries into the store, as those of workers that are gone.

    Nothing of a damaged spill stays in the store.

    Raises:
        DamagedSpill: naming the first file or entry that is not what was written.
    """
    ranks = record.layout[record.node_rank]
    try:
        for rank in ranks:
            _load_rank(root, record, rank, store)
    except DamagedSpill:
        unload(record, store)
        raise
    finally:
        for rank in ranks:
            store.orphan(rank)


def unload(record: Record, store: VaultStore) -> None:
    """Undo `load`."""
    for item in record.items:
        store.forget(item.global_rank, item.key)


def _load_rank(root: Path, record: Record, global_rank: int, store: VaultStore) -> None:
    path = _rank_file(root / record.name, global_rank)
    chunks: dict[tuple[str, int], list[Item]] = {}
    for item in record.items:
        if item.global_rank == global_rank:
            chunks.setdefault(split_key(item.key), []).append(item)
    try:
        with safe_open(path, framework="pt") as file:
            # Entries of one kind and iteration are dropped together, so they share a chunk.
            for items in chunks.values():
                _load_chunk(path, file, items, store)
    except (OSError, SafetensorError) as error:
        raise DamagedSpill(f"{path} cannot be read: {error}") from None


def _load_chunk(path: Path, file: Any, items: Sequence[Item], store: VaultStore) -> None:
    global_rank = items[0].global_rank
    chunk = store.new_chunk(global_rank, sum(align(item.nbytes) for item in items))
    memory, offset = map_shared(chunk.path, chunk.nbytes), 0
    for item in items:
        region = memory[offset : offset + item.nbytes]
        data: torch.Tensor = file.get_tensor(item.key)
        if data.shape != region.shape or data.dtype != torch.uint8:
            raise DamagedSpill(f"{path}: {item.key} has not the bytes that it had")
        region.copy_(data)
        # What is in memory is what counts, so that is what is checked.
        reason = damage(region.numpy(), item.checksum, item.parts)
        if reason is not None:
            raise DamagedSpill(f"{path}: {item.key} does not match its checksum: {reason}")
        seal = (item.checksum, item.meta, item.parts)
        store.publish(global_rank, Entry(item.key, chunk.number, offset, item.nbytes, *seal))
        offset = align(offset + item.nbytes)


def discard(root: Path, name: str, node_rank: int, global_ranks: Iterable[int]) -> None:
    """Removes this node's part of a spill, its record first; what cannot be removed stays."""
    folder = root / name
    record = _record_file(folder, node_rank)
    for path in (
        record,
        record.with_suffix(".draft"),
        *(_rank_file(folder, r) for r in global_ranks),
    ):
        try:
            path.unlink()
        except OSError:
            continue
    try:
        folder.rmdir()
    except OSError:
        return


def prune(root: Path, keep: Iterable[str], node_rank: int, global_ranks: Sequence[int]) -> None:
    """Removes this node's parts of all spills but these."""
    for folder in root.glob("*-*"):
        if folder.name not in set(keep):
            discard(root, folder.name, node_rank, global_ranks)
