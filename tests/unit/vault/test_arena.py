"""Chunks round up, are shared when mapped for writing and private when mapped for reading."""

import contextlib
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.vault.arena import (
    ALIGNMENT_BYTES,
    SMALLEST_CHUNK_BYTES,
    Chunk,
    align,
    map_private,
    map_shared,
    size_class,
)


def descriptors_of(chunk: Chunk) -> list[int]:
    """Of this process; others may come and go with what earlier tests have left to it."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if os.path.sameopenfile(fd, chunk.fd):
                found.append(fd)
    return found


@given(st.integers(0, 1 << 40))
def test_a_size_class_holds_the_size_and_wastes_at_most_a_quarter(nbytes: int) -> None:
    rounded = size_class(nbytes)
    assert rounded >= nbytes
    assert rounded <= max(SMALLEST_CHUNK_BYTES, nbytes * 1.25 + SMALLEST_CHUNK_BYTES // 4)
    assert rounded % 4096 == 0
    assert size_class(rounded) == rounded


@given(st.integers(0, 1 << 40))
def test_aligning_moves_forward_by_less_than_one_unit(offset: int) -> None:
    assert align(offset) % ALIGNMENT_BYTES == 0
    assert 0 <= align(offset) - offset < ALIGNMENT_BYTES


def test_a_private_mapping_sees_what_was_written_and_never_writes_back() -> None:
    chunk = Chunk.create(0, 10_000)
    shared = map_shared(chunk.path, chunk.nbytes)
    shared[5000:5003] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    private = map_private(chunk.path, 5000, 3)
    assert private.tolist() == [1, 2, 3]
    private[0] = 9
    assert shared[5000] == 1
    chunk.close()


def test_a_mapping_outlives_the_chunk_and_the_path_does_not() -> None:
    chunk = Chunk.create(0, 1)
    shared = map_shared(chunk.path, chunk.nbytes)
    chunk.close()
    shared.fill_(7)
    assert shared[-1] == 7
    assert not os.path.exists(chunk.path)


def test_an_empty_region_is_an_empty_tensor() -> None:
    assert map_private("/nonexistent", 0, 0).numel() == 0


def test_mapping_leaves_no_descriptor_open_once_the_tensor_is_gone() -> None:
    chunk = Chunk.create(0, 4096)
    for _ in range(10):
        map_private(chunk.path, 0, 100)
    assert descriptors_of(chunk) == [chunk.fd]
    chunk.close()


def test_a_missing_chunk_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        map_shared("/proc/self/fd/99999", 10)
