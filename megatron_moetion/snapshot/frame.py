"""A frame: what one rank captured after the optimizer step of one iteration.

Layout (pure), capture (device to host) and the way back. Raw bytes in native dtype, never tensor
subclasses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moetion.operators import Operator, ParamState
from megatron_moetion.schedule import FramePlan

_ALIGN = 64
BUFFERS = "buffers"
"""Pseudo-operator of the buffers that training mutates (router expert bias, token counters)."""


@dataclass(frozen=True)
class Piece:
    """One tensor inside a frame.

    Attributes:
        operator: its operator.
        param: its parameter's canonical name (or the buffer's).
        part: `light`, `main`, or the optimizer's name for a state tensor.
        dtype: torch dtype without the `torch.` prefix.
        shape: shape of the tensor on this rank.
        offset: bytes from the start of the frame.
        host: whether the live tensor is on the CPU even when the model is not (Adam's step
            counter).
    """

    operator: str
    param: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    host: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count * self.torch_dtype.itemsize


def live_parts(state: ParamState) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a full capture, by part name."""
    yield "main", state.main
    yield from state.states.tensors().items()


def sources(
    plan: FramePlan, operators: Mapping[str, Operator], buffers: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """(operator, param, part, live tensor) of everything that a frame holds, in layout order."""
    for name in plan.full:
        for state in operators[name].params:
            for part, tensor in live_parts(state):
                yield name, state.name, part, tensor
    for name in plan.light:
        for state in operators[name].params:
            yield name, state.name, "light", state.light
    for name, tensor in buffers.items():
        yield BUFFERS, name, "light", tensor


def layout(entries: Sequence[tuple[str, str, str, torch.Tensor]]) -> tuple[tuple[Piece, ...], int]:
    """Places tensors one after the other, 64-byte aligned: the pieces, and the frame's bytes."""
    pieces, offset = [], 0
    for operator, param, part, tensor in entries:
        dtype = str(tensor.dtype).removeprefix("torch.")
        host = tensor.device.type == "cpu"
        pieces.append(Piece(operator, param, part, dtype, tuple(tensor.shape), offset, host))
        offset = -(-(offset + tensor.nbytes) // _ALIGN) * _ALIGN
    return tuple(pieces), max(offset, _ALIGN)


def view(piece: Piece, data: torch.Tensor) -> torch.Tensor:
    """The piece's bytes inside a frame as a tensor; shares memory with `data` (uint8, CPU)."""
    raw = data[piece.offset : piece.offset + piece.nbytes]
    return raw.view(piece.torch_dtype).reshape(piece.shape)


def operator_ends(pieces: Sequence[Piece], nbytes: int) -> list[tuple[str, int]]:
    """Where each operator's stretch of a frame ends, in layout order.

    Args:
        nbytes: of the frame.
    """
    after = [*pieces[1:], None]
    edges = [(p.operator, n) for p, n in zip(pieces, after, strict=True)]
    return [
        (name, n.offset if n is not None else nbytes)
        for name, n in edges
        if n is None or n.operator != name
    ]


def to_meta(iteration: int, plan: FramePlan, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The frame's JSON description, kept in the vault beside its bytes."""
    rows = [[p.operator, p.param, p.part, p.dtype, list(p.shape), p.offset, p.host] for p in pieces]
    return {
        "iteration": iteration,
        "full": list(plan.full),
        "light": list(plan.light),
        "skipped": list(plan.skipped),
        "pieces": rows,
    }


def pieces_of(meta: Mapping[str, Any]) -> tuple[Piece, ...]:
    """The inverse of `to_meta`."""
    return tuple(
        Piece(o, n, part, d, tuple(s), off, h) for o, n, part, d, s, off, h in meta["pieces"]
    )


def copy_in(
    entries: Sequence[tuple[str, str, str, torch.Tensor]],
    pieces: Sequence[Piece],
    data: torch.Tensor,
) -> None:
    """Copies live tensors into a reserved region.

    Args:
        data: uint8 CPU tensor of at least the layout's size. On CUDA the copies are asynchronous on
            the current stream: the sources must not be overwritten before an event recorded after
            this call has fired.
    """
    if not entries:
        return
    targets = [view(p, data) for p in pieces]
    torch._foreach_copy_(targets, [t.detach() for *_, t in entries], non_blocking=True)
