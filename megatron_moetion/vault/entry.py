"""The types that travel between a worker, its agent and other agents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

KINDS = frozenset({"frame", "boundary", "collective", "batch", "header", "result", "interlude"})


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


Parts = Sequence[Sequence[Any]]
"""(name, end, checksum) of consecutive stretches of an entry: damage is named by them."""


def seal(data: Any, ends: Sequence[tuple[str, int]] = ()) -> tuple[str, Parts]:
    """The checksum of an entry and of its parts; every byte is read once.

    Args:
        data: contiguous buffer of bytes.
        ends: names of consecutive parts and where each ends, the last one at the buffer's end; none
            for an entry without parts.

    Returns:
        (`checksum` of the bytes or, with parts, of their checksums; the parts).
    """
    if not ends:
        return checksum(data), ()
    digests = [checksum(piece) for piece in _stretches(data, [end for _, end in ends])]
    parts = [(name, end, digest) for (name, end), digest in zip(ends, digests, strict=True)]
    return checksum("".join(digests).encode()), parts


def damage(data: Any, sealed: str, parts: Parts) -> str | None:
    """How the bytes differ from those that were sealed, naming the parts; None if they do not.

    Args:
        data: contiguous buffer of bytes.
        sealed: checksum of the entry.
        parts: of the entry.
    """
    if not parts:
        read = checksum(data)
        return None if read == sealed else f"sealed as {sealed}, read back as {read}"
    digests = [checksum(piece) for piece in _stretches(data, [end for _, end, _ in parts])]
    read = checksum("".join(digests).encode())
    if read == sealed:
        return None
    pairs = zip(parts, digests, strict=True)
    names = [name for (name, _, expected), digest in pairs if digest != expected]
    return f"sealed as {sealed}, read back as {read}: {', '.join(names)}"


def _stretches(data: Any, ends: Sequence[int]) -> Iterator[Any]:
    view = memoryview(data)
    for start, end in zip([0, *ends], ends, strict=False):
        yield view[start:end]


@dataclass(frozen=True)
class Entry:
    """One sealed region of a chunk.

    Attributes:
        key: "<kind>/<iteration>/<rest>".
        chunk: the agent's number for the chunk.
        offset: first byte in the chunk.
        nbytes: length in bytes.
        checksum: of the bytes at the time of sealing, see `seal`.
        meta: JSON object, opaque to the vault.
        parts: see `seal`.
    """

    key: str
    chunk: int
    offset: int
    nbytes: int
    checksum: str
    meta: Mapping[str, Any]
    parts: Parts = ()


@dataclass(frozen=True)
class Listing:
    """What an inventory says of an entry: everything but where it lies."""

    key: str
    nbytes: int
    meta: Mapping[str, Any]
