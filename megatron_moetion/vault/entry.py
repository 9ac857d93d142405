"""The types that travel between a worker, its agent and other agents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

KINDS = frozenset({"frame", "boundary", "collective", "batch", "header", "result"})


def split_key(key: str) -> tuple[str, int]:
    """Read kind and iteration out of a key.

    Args:
        key: "<kind>/<iteration>/<rest>".

    Raises:
        ValueError: the key does not follow the grammar.
    """
    kind, _, rest = key.partition("/")
    iteration, _, _ = rest.partition("/")
    if kind not in KINDS or not iteration.isdecimal():
        raise ValueError(
            f"vault key {key!r} is not '<kind>/<iteration>/<rest>' with a kind out of"
            f" {', '.join(sorted(KINDS))}"
        )
    return kind, int(iteration)


def checksum(data: Any) -> str:
    """xxh3_64 of a contiguous buffer, as hex (JSON numbers lose bits in other readers)."""
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True)
class Entry:
    """One sealed region of a chunk.

    Attributes:
        key: "<kind>/<iteration>/<rest>".
        chunk: the agent's number for the chunk.
        offset: first byte in the chunk.
        nbytes: length in bytes.
        checksum: `checksum` of the bytes at the time of sealing.
        meta: JSON object, opaque to the vault.
    """

    key: str
    chunk: int
    offset: int
    nbytes: int
    checksum: str
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """What an inventory says of an entry: everything but where it lies."""

    key: str
    nbytes: int
    meta: Mapping[str, Any]
