"""Compares the digests of two runs of any length: each file is read once, line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_moetion.digest import FOLDER


class NotSame(Exception):
    """The runs differ; the text says where first."""


@dataclass(frozen=True)
class Same:
    """How much was compared and found equal."""

    records: int
    hashes: int


def newest(directory: Path, world_size: int) -> int:
    """The last iteration that every rank has recorded; 0 if one has recorded none."""
    return min(max(_places(directory, rank), default=0) for rank in range(world_size))


def assert_same(run: Path, reference: Path, world_size: int, iterations: int) -> Same:
    """Every record of the run, up to `iterations` at least, equals that of the reference.

    Raises:
        NotSame: naming the first rank, iteration and tensor that differ, or that lack.
    """
    records = hashes = 0
    for rank in range(world_size):
        found = _places(run, rank)
        for iteration, row in _rows(reference, rank):
            if iteration not in found:
                if iteration <= iterations:
                    raise NotSame(f"rank {rank} recorded nothing of iteration {iteration}")
                continue
            records, hashes = records + 1, hashes + len(row["loss"]) + len(row["tensors"])
            if found[iteration].bits != _bits(row):
                raise NotSame(_difference(run, rank, found[iteration], row))
            del found[iteration]
        if min(found, default=iterations + 1) <= iterations:
            raise NotSame(f"the reference has no iteration {min(found)} of rank {rank}")
    return Same(records, hashes)


@dataclass(frozen=True)
class _Place:
    """A record without its content: 8 KiB are 40 bytes."""

    offset: int
    bits: int


def _bits(row: dict[str, dict[str, str]]) -> int:
    return xxhash.xxh3_128_intdigest(json.dumps([row["loss"], row["tensors"]]).encode())


def _rows(directory: Path, rank: int) -> Iterator[tuple[int, dict[str, dict[str, str]]]]:
    with (directory / FOLDER / f"rank{rank}.jsonl").open() as file:
        for line in file:
            row = json.loads(line)
            yield row["iteration"], row


def _places(directory: Path, rank: int) -> dict[int, _Place]:
    """Records by iteration.

    Raises:
        NotSame: what is run again after a recovery was recorded with other bits.
    """
    found: dict[int, _Place] = {}
    offset = 0
    with (directory / FOLDER / f"rank{rank}.jsonl").open("rb") as file:
        for line in file:
            row = json.loads(line)
            place = _Place(offset, _bits(row))
            before = found.setdefault(row["iteration"], place)
            if before.bits != place.bits:
                raise NotSame(f"run again: {_difference(directory, rank, before, row)}")
            offset += len(line)
    return found


def _difference(directory: Path, rank: int, place: _Place, row: dict[str, dict[str, str]]) -> str:
    with (directory / FOLDER / f"rank{rank}.jsonl").open("rb") as file:
        file.seek(place.offset)
        other = json.loads(file.readline())
    names = [
        f"{part} {name}"
        for part in ("loss", "tensors")
        for name in sorted(row[part].keys() | other[part].keys())
        if row[part].get(name) != other[part].get(name)
    ]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"rank {rank}, iteration {other['iteration']}: {names[0]}{more}"
