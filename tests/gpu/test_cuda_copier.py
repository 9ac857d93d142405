"""What a copier promises on a GPU: asynchronous, ordered, safe against reuse of memory."""

import mmap
import os
from collections.abc import Iterator

import pytest
import torch

from megatron_moetion.snapshot.copier import CudaCopier, register_pinned
from megatron_moetion.snapshot.frame import BUFFERS, Source, layout, view
from megatron_moetion.vault import LocalVault

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
LONG_CYCLES = 400_000_000
"""Keeps a stream busy for about a fifth of a second."""


@pytest.fixture
def copier(gpu: None) -> Iterator[CudaCopier]:
    made = CudaCopier(torch.device("cuda", 0))
    yield made
    made.close()


@pytest.fixture
def vault(gpu: None) -> LocalVault:
    return LocalVault(0, register_pinned)


def nothing() -> None:
    pass


def test_a_registered_chunk_of_shared_memory_is_pinned(gpu: None) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 1 << 20)
    chunk = torch.frombuffer(mmap.mmap(fd, 1 << 20), dtype=torch.uint8)
    os.close(fd)
    assert not chunk.is_pinned()
    register_pinned(chunk)
    assert chunk.is_pinned()
    assert chunk[4096:8192].is_pinned()


def test_a_copy_returns_before_the_device_is_done_and_is_sealed_after(
    copier: CudaCopier, vault: LocalVault
) -> None:
    entries = [Source("expert", "w", "main", torch.randn(1 << 20, device="cuda"))]
    entries += [Source("expert", "w", "step", torch.tensor(3.0))]
    pieces, nbytes = layout(entries)
    data = vault.reserve("frame/1", nbytes)
    torch.cuda._sleep(LONG_CYCLES)
    ticket = copier.copy(entries, pieces, data)
    copier.seal(ticket, "frame/1", lambda: vault.seal("frame/1", {}), nothing)
    assert not ticket.done()
    assert vault.fetch(0, "frame/1") is None
    assert ticket.wait()
    found = vault.fetch(0, "frame/1")
    assert found is not None
    for piece, entry in zip(pieces, entries, strict=True):
        assert torch.equal(view(piece, found.data), entry.live.cpu())


def test_a_step_that_waits_for_the_ticket_does_not_reach_the_copy(
    copier: CudaCopier, vault: LocalVault
) -> None:
    for iteration in range(20):
        state = torch.full((1 << 22,), float(iteration), device="cuda")
        entries = [Source("expert", "w", "main", state)]
        pieces, nbytes = layout(entries)
        data = vault.reserve(f"frame/{iteration}", nbytes)
        ticket = copier.copy(entries, pieces, data)
        ticket.wait_on_device()
        state.add_(1000.0)
        ticket.wait_for_bytes()
        assert view(pieces[0], data).eq(iteration).all()
        vault.abandon(f"frame/{iteration}")


def test_a_buffer_may_change_right_after_the_copy_was_asked_for(
    copier: CudaCopier, vault: LocalVault
) -> None:
    counter = torch.full((1 << 20,), 7, device="cuda")
    entries = [Source(BUFFERS, "tokens", "light", counter)]
    pieces, nbytes = layout(entries)
    data = vault.reserve("frame/1", nbytes)
    ticket = copier.copy(entries, pieces, data)
    counter.zero_()
    ticket.wait_for_bytes()
    assert view(pieces[0], data).eq(7).all()


def test_memory_of_a_freed_boundary_tensor_is_not_reused_before_it_is_copied(
    copier: CudaCopier,
) -> None:
    target = torch.empty(1 << 22, pin_memory=True)
    for value in range(10):
        boundary = torch.full((1 << 22,), float(value), device="cuda")
        with torch.cuda.stream(copier._stream):
            torch.cuda._sleep(LONG_CYCLES // 20)
        ticket = copier.copy_passing([boundary], [target])
        del boundary
        # Without record_stream the allocator would hand out the same block here.
        torch.full((1 << 22,), -1.0, device="cuda")
        ticket.wait_for_bytes()
        assert target.eq(value).all()
