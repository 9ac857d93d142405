"""What a copier promises on a CPU; tests/gpu has what takes a GPU."""

import threading

import pytest
import torch

from megatron_moetion.rehearsal import streams
from megatron_moetion.snapshot.copier import Copier, CpuCopier, CudaCopier, Ticket, copier_for
from megatron_moetion.snapshot.frame import BUFFERS, Source, layout, view
from megatron_moetion.vault import LocalVault


@pytest.fixture
def failures() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def copier(failures: list[tuple[str, str]]) -> Copier:
    return CpuCopier(lambda name, error: failures.append((name, str(error))))


ENTRIES = [
    Source("expert.0", "w", "main", torch.randn(7, 3)),
    Source("expert.0", "w", "exp_avg", torch.randn(7, 3).bfloat16()),
    Source("expert.0", "w", "step", torch.tensor(4.0)),
    Source(BUFFERS, "bias", "light", torch.arange(5)),
]


def nothing() -> None:
    pass


def test_a_frame_is_copied_bit_for_bit_in_two_parts_and_sealed(copier: Copier) -> None:
    vault = LocalVault(0)
    pieces, nbytes = layout(ENTRIES)
    data = vault.reserve("frame/3", nbytes)
    copier.copy(ENTRIES[:2], pieces[:2], data)
    ticket = copier.copy(ENTRIES[2:], pieces[2:], data)
    copier.seal(ticket, "frame/3", lambda: vault.seal("frame/3", {}), nothing)
    found = vault.fetch(0, "frame/3")
    assert found is not None
    for piece, entry in zip(pieces, ENTRIES, strict=True):
        assert torch.equal(view(piece, found.data), entry.live)


def test_sources_may_change_once_a_cpu_copy_returned(copier: Copier) -> None:
    source, target = torch.ones(4), torch.empty(4)
    copier.copy_passing([source], [target])
    source.zero_()
    assert target.tolist() == [1.0] * 4


def test_a_seal_that_fails_is_counted_reported_and_discarded_but_never_raised(
    copier: Copier, failures: list[tuple[str, str]]
) -> None:
    discarded = []

    def publish() -> None:
        raise OSError("no room")

    ticket = copier.copy([], [], torch.empty(0, dtype=torch.uint8))
    copier.seal(ticket, "frame/9", publish, lambda: discarded.append("frame/9"))
    assert failures == [("frame/9", "no room")]
    assert copier.num_failures == 1
    assert discarded == ["frame/9"]
    assert ticket.done()
    assert not ticket.wait()


def test_a_report_that_cannot_be_written_does_not_reach_training_either() -> None:
    def full_disk(name: str, error: Exception) -> None:
        raise OSError("no space left")

    copier = CpuCopier(full_disk)
    ticket = copier.copy([], [], torch.empty(0, dtype=torch.uint8))
    copier.seal(ticket, "frame/1", lambda: 1 / 0, nothing)
    assert copier.num_failures == 1
    assert ticket.done()


def test_after_a_failed_seal_the_next_one_succeeds(copier: Copier) -> None:
    vault = LocalVault(0)
    ticket = Ticket(0, 0.0)
    # Never reserved.
    copier.seal(ticket, "frame/1", lambda: vault.seal("frame/1", {}), lambda: vault.abandon("x"))
    vault.reserve("frame/2", 64)
    ticket = Ticket(0, 0.0)
    copier.seal(ticket, "frame/2", lambda: vault.seal("frame/2", {}), nothing)
    assert ticket.wait()
    assert copier.num_failures == 1


def test_a_ticket_is_done_only_after_its_seal(copier: Copier) -> None:
    ticket = copier.copy([], [], torch.empty(0, dtype=torch.uint8))
    assert not ticket.done()
    copier.seal(ticket, "frame/1", nothing, nothing)
    assert ticket.done()


def test_waiting_for_a_cpu_ticket_returns_at_once(copier: Copier) -> None:
    ticket = copier.copy([], [], torch.empty(0, dtype=torch.uint8))
    ticket.wait_on_device()
    ticket.wait_for_bytes()


def test_a_cpu_copier_seals_on_the_calling_thread(copier: Copier) -> None:
    seen = []
    ticket = Ticket(0, 0.0)
    copier.seal(ticket, "frame/1", lambda: seen.append(threading.current_thread()), nothing)
    assert seen == [threading.current_thread()]


def test_the_device_chooses_the_copier() -> None:
    assert isinstance(copier_for(torch.device("cpu")), CpuCopier)


class LateEvent(streams.Event):
    """Fires when the test says so."""

    fired = threading.Event()

    def synchronize(self) -> None:
        self.fired.wait()


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch, failures: list[tuple[str, str]]) -> Copier:
    """The copier of a GPU, over the rehearsal's streams and an event that fires late."""
    LateEvent.fired = threading.Event()
    only = streams.Stream()
    monkeypatch.setattr(torch.cuda, "Stream", streams.Stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: LateEvent())
    monkeypatch.setattr(torch.cuda, "stream", streams.StreamContext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: only)
    return CudaCopier(torch.device("cpu"), lambda name, error: failures.append((name, str(error))))


def test_a_gpu_copy_is_sealed_behind_its_event_and_in_order(behind: Copier) -> None:
    sealed: list[str] = []
    tickets = []
    for name in ("frame/1", "boundary/2/x", "frame/2"):
        ticket = behind.copy_passing([torch.ones(2)], [torch.empty(2)])
        behind.seal(ticket, name, lambda name=name: sealed.append(name), nothing)
        tickets.append(ticket)
    assert not sealed
    assert not any(ticket.done() for ticket in tickets)
    LateEvent.fired.set()
    behind.drain()
    assert sealed == ["frame/1", "boundary/2/x", "frame/2"]
    assert all(ticket.wait() for ticket in tickets)
    behind.close()


def test_a_failing_seal_does_not_stop_the_sealing_thread(
    behind: Copier, failures: list[tuple[str, str]]
) -> None:
    LateEvent.fired.set()
    vault = LocalVault(0)
    first = behind.copy_passing([], [])
    behind.seal(first, "frame/1", lambda: vault.seal("frame/1", {}), lambda: vault.abandon("x"))
    vault.reserve("frame/2", 64)
    second = behind.copy_passing([], [])
    behind.seal(second, "frame/2", lambda: vault.seal("frame/2", {}), nothing)
    assert second.wait()
    assert not first.wait()
    assert [name for name, _ in failures] == ["frame/1"]
    behind.close()


def test_buffers_and_unsteady_tensors_are_cloned_before_the_copy(behind: Copier) -> None:
    LateEvent.fired.set()
    seen: list[int] = []
    clone = torch.Tensor.clone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", lambda t: seen.append(t.numel()) or clone(t))
        pieces, nbytes = layout(ENTRIES)
        behind.copy(ENTRIES, pieces, torch.empty(nbytes, dtype=torch.uint8))
        behind.copy_passing([torch.ones(2)], [torch.empty(2)])
        behind.copy_passing([torch.ones(3)], [torch.empty(3)], steady=False)
    assert seen == [5, 3]
    behind.close()
