"""A frame: what one rank captured after the optimizer step of one iteration.

Layout (pure), capture (device to host) and the way back. Raw bytes in native dtype, never tensor
subclasses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from megatron_moetion.operators import GRADIENT, LIGHT, Operator, ParamState
from megatron_moetion.parts import Stretch
from megatron_moetion.schedule import FramePlan

_ALIGN = 64
BUFFERS = "buffers"
"""Pseudo-operator of the buffers that training mutates (router expert bias, token counters)."""


class Source(NamedTuple):
    """A live tensor that a frame holds, see `Piece`."""

    operator: str
    param: str
    tensor: str
    live: torch.Tensor
    stretch: Stretch | None = None


@dataclass(frozen=True)
class Piece:
    """One tensor inside a frame, or a stretch of it.

    Attributes:
        operator: its operator.
        param: its parameter's canonical name (or the buffer's).
        tensor: `light`, `gradient`, `main`, or the optimizer's name for a state tensor.
        dtype: torch dtype without the `torch.` prefix.
        shape: shape of the tensor on this rank; of a stretch its number of elements.
        offset: bytes from the start of the frame.
        host: whether the live tensor is on the CPU even when the model is not (Adam's step
            counter).
        stretch: the elements of the flat tensor that are here; None where all are.
    """

    operator: str
    param: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    host: bool
    stretch: Stretch | None = None

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


def live_tensors(state: ParamState) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a full capture, by name."""
    yield "main", state.main
    yield from state.states.tensors().items()


def sources(
    plan: FramePlan, operators: Mapping[str, Operator], buffers: Mapping[str, torch.Tensor]
) -> Iterator[Source]:
    """Everything that a frame holds, in layout order.

    Optimizer tensors of another shape than the parameter's shard (Adam's step counter) go with
    every part. The tensors are live: views where a part is asked for.
    """
    for part in plan.full:
        for state in operators[part.operator].params:
            for name, live in live_tensors(state):
                if part.count == 1 or live.shape != state.main.shape:
                    yield Source(part.operator, state.name, name, live)
                else:
                    here = part.stretch(live.numel())
                    piece = live.detach().view(-1)[here.start : here.end]
                    yield Source(part.operator, state.name, name, piece, here)
    for operator in plan.light:
        for state in operators[operator].params:
            name, live_rest = state.rest
            if live_rest is not None:
                yield Source(operator, state.name, name, live_rest)
    for name, tensor in buffers.items():
        yield Source(BUFFERS, name, LIGHT, tensor)


def layout(entries: Sequence[Source]) -> tuple[tuple[Piece, ...], int]:
    """Places tensors one after the other, 64-byte aligned: the pieces, and the frame's bytes."""
    pieces, offset = [], 0
    for operator, param, tensor, live, stretch in entries:
        dtype = str(live.dtype).removeprefix("torch.")
        host, shape = live.device.type == "cpu", tuple(live.shape)
        pieces.append(Piece(operator, param, tensor, dtype, shape, offset, host, stretch))
        offset = -(-(offset + live.nbytes) // _ALIGN) * _ALIGN
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
    edges = [(p.operator, n) for p, n in zip_longest(pieces, pieces[1:])]
    return [
        (name, n.offset if n is not None else nbytes)
        for name, n in edges
        if n is None or n.operator != name
    ]


def to_meta(
    iteration: int, plan: FramePlan, pieces: Sequence[Piece], stepped: bool = True
) -> dict[str, Any]:
    """The frame's JSON description, kept in the vault beside its bytes.

    Args:
        stepped: the optimizer made its update in that iteration; it does not after an overflow.
    """
    rows = [
        [p.operator, p.param, p.tensor, p.dtype, list(p.shape), p.offset, p.host, p.stretch]
        for p in pieces
    ]
    return {
        "iteration": iteration,
        "full": [part.to_json() for part in plan.full],
        "light": list(plan.light),
        "skipped": list(plan.skipped),
        "stepped": stepped,
        "pieces": rows,
    }


def pieces_of(meta: Mapping[str, Any]) -> tuple[Piece, ...]:
    """The pieces in `to_meta`."""
    return tuple(
        Piece(o, n, t, d, tuple(s), off, h, None if stretch is None else Stretch(*stretch))
        for o, n, t, d, s, off, h, stretch in meta["pieces"]
    )


def not_finite(pieces: Sequence[Piece], data: torch.Tensor, stepped: bool) -> str | None:
    """Which tensors of a frame hold NaN or infinity; None when none does.

    Args:
        data: uint8 on the CPU, the frame.
        stepped: see `to_meta`; the gradients of an overflow are none that anything is made of.
    """
    bad = [
        f"{piece.tensor} of {piece.param}"
        for piece in pieces
        if (stepped or piece.tensor != GRADIENT)
        and piece.torch_dtype.is_floating_point
        and not torch.isfinite(view(piece, data)).all()
    ]
    if not bad:
        return None
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"not finite when it was sealed: {bad[0]}{more}"


def poison(pieces: Sequence[Piece], data: torch.Tensor) -> None:
    """Does what a scripted fault asks for: the first optimizer state of a frame is NaN."""
    view(next(piece for piece in pieces if piece.tensor == "main"), data).fill_(float("nan"))


def copy_in(
    entries: Sequence[Source],
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
    torch._foreach_copy_(targets, [e.live.detach() for e in entries], non_blocking=True)
