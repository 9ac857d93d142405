"""From the device into the vault without holding up training.

A copy runs on a side stream; the step that would overwrite its source waits for it on the device,
never on the host. One thread waits until the bytes have arrived and then seals them, in order: a
frame is published only after everything that was copied before it. On a CPU both happen at once.

Source: design section 5 (order of a capture).
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from megatron_moetion.operators import GRADIENT
from megatron_moetion.snapshot.frame import BUFFERS, Piece, Source, view

# Parts of it carry no types.
_cuda: Any = torch.cuda

OnFailure = Callable[[str, Exception], None]
"""Told of a seal that failed: what it was for, and why. May run in the sealing thread."""


class Ticket:
    """One copy on its way; good for as long as anybody asks.

    Args:
        nbytes: that are copied.
        began: when; an event where `event` is one, else `time.perf_counter`.
        event: fires when the bytes have arrived; None where they are there already.
    """

    def __init__(self, nbytes: int, began: Any, event: Any = None) -> None:
        self.nbytes, self._began, self._event = nbytes, began, event
        self._seconds = 0.0 if event is not None else time.perf_counter() - began
        self._settled = threading.Event()
        self.sealed = False

    def wait_on_device(self) -> None:
        """Makes the current stream wait for the copy; the host goes on at once.

        Work issued on the current stream from now on may overwrite the copy's sources.
        """
        if self._event is not None:
            _cuda.current_stream().wait_event(self._event)

    def wait_for_bytes(self) -> None:
        """Blocks the calling thread until the bytes are in host memory."""
        if self._event is not None:
            self._event.synchronize()

    def seconds(self) -> float:
        """How long the copy took; to be asked once its bytes are there."""
        if self._event is not None:
            return float(self._began.elapsed_time(self._event)) / 1000
        return self._seconds

    def done(self) -> bool:
        """Whether `seal` has come to an end, well or not; always False before it is asked for."""
        return self._settled.is_set()

    def wait(self) -> bool:
        """Blocks the calling thread until `done`; to be called only after `Copier.seal`.

        Returns:
            Whether the entry is sealed.
        """
        self._settled.wait()
        return self.sealed

    def settle(self, sealed: bool) -> None:
        """Called once, by the copier."""
        self.sealed = sealed
        self._settled.set()


class Copier(ABC):
    """Copies live tensors into reserved regions and has them sealed.

    A failing seal never reaches training: it is counted in `num_failures` and reported.

    Args:
        on_failure: told of each failed seal; without it one line goes to stderr.
    """

    def __init__(self, on_failure: OnFailure | None = None) -> None:
        self._on_failure = on_failure or _print_failure
        self.num_failures = 0

    def copy(
        self, entries: Sequence[Source], pieces: Sequence[Piece], data: torch.Tensor
    ) -> Ticket:
        """Starts copying part of a frame.

        Model buffers and gradients may be overwritten once this returns: they are copied on the
        device first, which takes as much of its memory. The other sources must stay as they are
        until a stream that waited for the ticket (`Ticket.wait_on_device`) writes to them.
        `data` belongs to the copy until it is sealed or, without a seal, until
        `Ticket.wait_for_bytes` returns.

        Args:
            entries: what `frame.sources` lists, or a stretch of it.
            pieces: their places, from `frame.layout`.
            data: uint8 CPU tensor of the layout's size; asynchronous only when it is pinned.
        """
        # The next forward and backward passes change them, before the next step would wait.
        steady = [e.operator != BUFFERS and e.tensor != GRADIENT for e in entries]
        return self._start([e.live for e in entries], [view(p, data) for p in pieces], steady)

    def copy_passing(
        self, tensors: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], steady: bool = True
    ) -> Ticket:
        """Starts copying tensors that the caller lets go of: boundary tensors, collective results.

        Once this returns, the caller may free the sources. It may overwrite them only when
        `steady` is False; they are then first copied on the device.

        Args:
            tensors: contiguous or not, on any device.
            targets: CPU tensors of the same shapes and dtypes; for their lifetime see `copy`.
            steady: whether nobody writes to the sources before they are freed.
        """
        return self._start(tensors, targets, [steady] * len(tensors), passing=True)

    @abstractmethod
    def seal(
        self,
        ticket: Ticket,
        name: str,
        publish: Callable[[], None],
        discard: Callable[[], None],
    ) -> None:
        """Has an entry sealed once its ticket's bytes and those of all tickets before are there.

        Args:
            ticket: of the last copy into the entry; one seal per ticket.
            name: the entry's key, for reports.
            publish: seals the entry. Runs in the sealing thread, so it must not touch the device.
            discard: gives the region up after `publish` failed; must not fail itself.
        """

    @abstractmethod
    def drain(self) -> None:
        """Blocks until every seal asked for so far has come to an end."""

    @abstractmethod
    def close(self) -> None:
        """Drains and ends; nothing may be copied afterwards."""

    @abstractmethod
    def _start(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        steady: Sequence[bool],
        passing: bool = False,
    ) -> Ticket: ...

    def _finish(
        self, ticket: Ticket, name: str, publish: Callable[[], None], discard: Callable[[], None]
    ) -> None:
        try:
            ticket.wait_for_bytes()
            publish()
        # Whatever kept one copy from being sealed: training goes on with the older ones, and the
        # failure is counted and reported by name.
        except Exception as error:
            self.num_failures += 1
            discard()
            ticket.settle(sealed=False)
            # A full disk must not end training; the count above still tells.
            with suppress(OSError):
                self._on_failure(name, error)
        else:
            ticket.settle(sealed=True)


class CpuCopier(Copier):
    """Everything at once, on the calling thread: a ticket's bytes are there when it is handed out.

    All sources may be overwritten once `copy` or `copy_passing` returns.
    """

    def seal(
        self, ticket: Ticket, name: str, publish: Callable[[], None], discard: Callable[[], None]
    ) -> None:
        self._finish(ticket, name, publish, discard)

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _start(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        steady: Sequence[bool],
        passing: bool = False,
    ) -> Ticket:
        began = time.perf_counter()
        _copy(targets, sources)
        return Ticket(sum(t.nbytes for t in targets), began)


_Seal = tuple[Ticket, str, Callable[[], None], Callable[[], None]]


class CudaCopier(Copier):
    """Copies on a side stream of one GPU; seals in one background thread.

    Copies of one copier run one after the other, so the ticket of the last one covers all before.

    Args:
        device: the CUDA device that training runs on.
        on_failure: see `Copier`; runs in the sealing thread.
    """

    def __init__(self, device: torch.device, on_failure: OnFailure | None = None) -> None:
        super().__init__(on_failure)
        self._device = device
        self._stream = _cuda.Stream(device)
        self._seals: queue.Queue[_Seal | None] = queue.Queue()
        # A daemon: a worker that is to end must not wait for a GPU that never answers.
        self._thread = threading.Thread(target=self._run, name="moetion-seal", daemon=True)
        self._thread.start()

    def seal(
        self, ticket: Ticket, name: str, publish: Callable[[], None], discard: Callable[[], None]
    ) -> None:
        self._seals.put((ticket, name, publish, discard))

    def drain(self) -> None:
        self._seals.join()

    def close(self) -> None:
        self._seals.put(None)
        self._thread.join()

    def _start(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        steady: Sequence[bool],
        passing: bool = False,
    ) -> Ticket:
        pairs = list(zip(sources, steady, strict=True))
        safe = [t.detach() if is_steady else t.detach().clone() for t, is_steady in pairs]
        # Behind the clones and behind whatever last wrote to the sources.
        self._stream.wait_stream(_cuda.current_stream(self._device))
        with _cuda.stream(self._stream):
            # Without it the sealing thread would spin, on a core that the data loader could use.
            began, event = (_cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            began.record(self._stream)
            _copy(targets, safe)
            event.record(self._stream)
        for tensor, is_steady in zip(safe, steady, strict=True):
            # The allocator must not hand this memory to the next activation before it is copied.
            if tensor.is_cuda and (passing or not is_steady):
                tensor.record_stream(self._stream)
        return Ticket(sum(t.nbytes for t in targets), began, event)

    def _run(self) -> None:
        while (seal := self._seals.get()) is not None:
            self._finish(*seal)
            self._seals.task_done()
        self._seals.task_done()


def copier_for(device: torch.device, on_failure: OnFailure | None = None) -> Copier:
    """The copier for tensors of this device."""
    if device.type == "cuda":
        return CudaCopier(device, on_failure)
    return CpuCopier(on_failure)


def register_pinned(chunk: torch.Tensor) -> None:
    """Page-locks a chunk of shared memory, so that copies into it can be asynchronous.

    The registration lasts until `unregister_pinned`; the chunk must stay mapped that long.

    Raises:
        torch.cuda.CudaError: the driver refuses, for example for lack of lockable memory.
    """
    _cuda.check_error(_cuda.cudart().cudaHostRegister(chunk.data_ptr(), chunk.nbytes, 0))


def unregister_pinned(chunk: torch.Tensor) -> None:
    """Undoes `register_pinned`, before the chunk is unmapped.

    Raises:
        torch.cuda.CudaError: it is not registered.
    """
    _cuda.check_error(_cuda.cudart().cudaHostUnregister(chunk.data_ptr()))


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), [t.detach() for t in sources], non_blocking=True)


def _print_failure(name: str, error: Exception) -> None:
    print(f"moetion: {name} could not be sealed and is not protected: {error}", file=sys.stderr)
