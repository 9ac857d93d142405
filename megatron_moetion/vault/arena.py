"""Chunks of anonymous shared memory: made by the agent, mapped by path by whoever may."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 64
SMALLEST_CHUNK_BYTES = 1 << 20


def size_class(nbytes: int) -> int:
    """Round a chunk size up to a quarter of a power of two, so that dropped chunks can be reused.

    Pages that nobody touches cost nothing in a memfd; the rounding costs address space only.
    """
    wanted = max(nbytes, SMALLEST_CHUNK_BYTES)
    step = max((1 << (wanted - 1).bit_length()) // 8, SMALLEST_CHUNK_BYTES // 4)
    return -(-wanted // step) * step


def align(offset: int) -> int:
    """The next offset at which an entry may start."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Chunk:
    """A memfd and where other processes of this user find it.

    Attributes:
        number: the owner's number for it.
        fd: open in the process that created it, until `close`.
        path: "/proc/<pid>/fd/<n>", valid while that process lives.
        nbytes: capacity in bytes.
    """

    number: int
    fd: int
    path: str
    nbytes: int

    @classmethod
    def create(cls, number: int, nbytes: int) -> Chunk:
        """Allocate a chunk of `size_class(nbytes)` bytes."""
        capacity = size_class(nbytes)
        fd = os.memfd_create(f"moetion-{number}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, capacity)
        except OSError:
            os.close(fd)
            raise
        return cls(number, fd, f"/proc/{os.getpid()}/fd/{fd}", capacity)

    def hollow_out(self) -> None:
        """Give the memory back at once; whoever has the chunk mapped reads zeros from now on."""
        with mmap.mmap(self.fd, self.nbytes) as mapping:
            mapping.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Give the memory back once the last mapping is gone too."""
        os.close(self.fd)


def map_shared(path: str, nbytes: int) -> torch.Tensor:
    """Map a whole chunk for writing.

    Returns:
        uint8 tensor of shape [nbytes]; it keeps the mapping alive.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapping = mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def map_private(path: str, offset: int, nbytes: int) -> torch.Tensor:
    """Map one region of a chunk copy-on-write.

    Writing to the result never reaches the arena. What the owner writes there later may show
    through: the result is good until the owner drops the entry.

    Returns:
        uint8 tensor of shape [nbytes]; it keeps the mapping alive.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mapping = mmap.mmap(
            fd,
            nbytes + offset - start,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=start,
        )
    finally:
        os.close(fd)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=offset - start)
