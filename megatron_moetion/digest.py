"""Hashes of the whole training state, to compare runs bit for bit.

Every rank appends one JSON line per recorded iteration to `<dir>/digest/rank<N>.jsonl`: a hash of
each tensor by canonical name, and the loss with all its bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_moetion.operators import Operator

FOLDER = "digest"


def tensor_hash(tensor: torch.Tensor) -> str:
    """xxh3 of a tensor's raw bytes, dtype and shape; copies to the host."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = xxhash.xxh3_64(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(memoryview(raw))
    return digest.hexdigest()


def state_hashes(
    operators: Sequence[Operator], buffers: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Hashes of this rank's compute weights, FP32 shards, optimizer tensors and model buffers."""
    found = {f"{name} buffer": tensor_hash(t) for name, t in buffers.items()}
    for operator in operators:
        for state in operator.params:
            if state.light.numel():
                found[f"{state.name} weight"] = tensor_hash(state.light)
                found[f"{state.name} main"] = tensor_hash(state.main)
                for part, tensor in state.states.tensors().items():
                    found[f"{state.name} {part}"] = tensor_hash(tensor)
    return dict(sorted(found.items()))


def record(
    directory: Path,
    global_rank: int,
    iteration: int,
    losses: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> None:
    """Appends one record. `losses` maps names to tensors or numbers; their bits are kept."""
    path = directory / FOLDER / f"rank{global_rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    bits = {
        name: bytes(torch.as_tensor(v).cpu().reshape(-1).view(torch.uint8)).hex()
        for name, v in losses.items()
    }
    line = json.dumps({"iteration": iteration, "loss": bits, "tensors": dict(hashes)})
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Difference:
    """The first place where two runs differ."""

    iteration: int
    global_rank: int
    what: str

    def __str__(self) -> str:
        return f"iteration {self.iteration}, global rank {self.global_rank}: {self.what}"


@dataclass(frozen=True)
class Comparison:
    """The outcome of comparing `records` pairs of (rank, iteration): equal without `difference`."""

    records: int
    tensors: int
    difference: Difference | None

    def __str__(self) -> str:
        if self.difference is None:
            return f"equal: {self.records} records, {self.tensors} tensor hashes"
        return f"different: {self.difference}"


class NoDigest(ValueError):
    """A directory holds no digests."""


def read(directory: Path) -> dict[tuple[int, int], dict[str, str]]:
    """All records as {(iteration, global_rank): {name: bits}}.

    Raises:
        NoDigest: when there is nothing to read, or one rank recorded an iteration twice with
            different bits.
    """
    found: dict[tuple[int, int], dict[str, str]] = {}
    for path, line in _lines(directory):
        row = json.loads(line)
        values = {**{f"loss {k}": v for k, v in row["loss"].items()}, **row["tensors"]}
        key = (row["iteration"], int(path.stem.removeprefix("rank")))
        if found.setdefault(key, values) != values:
            raise NoDigest(f"{path}: iteration {key[0]} was recorded twice, with different bits")
    if not found:
        raise NoDigest(f"{directory} holds no digests; run with --moetion-digest-interval N")
    return found


def _lines(directory: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted((directory / FOLDER).glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            yield path, line


def compare(a: Path, b: Path) -> Comparison:
    """Compares every record of two runs, in order of iterations.

    Raises:
        NoDigest: when a run has no usable records.
    """
    left, right = read(a), read(b)
    tensors = 0
    for key in sorted(left.keys() | right.keys()):
        x, y = left.get(key), right.get(key)
        if x is None or y is None:
            return Comparison(
                len(left), tensors, Difference(*key, f"recorded only in {b if x is None else a}")
            )
        for name in sorted(x.keys() | y.keys()):
            tensors += 1
            if x.get(name) != y.get(name):
                return Comparison(len(left), tensors, Difference(*key, name))
    return Comparison(len(left), tensors, None)
