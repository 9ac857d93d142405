"""Rebuilding a failed stage: sparse-to-dense conversion, then catch-up.

Source: paper section 3.3, design section 7.

Runs on every rank of the failed stage in lockstep. Frames base, base+1, ... are loaded one after
the other; in between, the host's own training step runs again from the inbox. An operator without
full state is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_moetion.host import Host
from megatron_moetion.inbox.key import FrameKey, HeaderKey
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.operators import ParamState
from megatron_moetion.recovery.failure import MissingFromInbox, ReplayDiverged
from megatron_moetion.recovery.plan import NothingToRebuildFrom, StagePlan
from megatron_moetion.snapshot.frame import BUFFERS, Piece, pieces_of, view
from megatron_moetion.vault import Vault


class Frames:
    """This rank's frames, read back from the vault and put into the live model."""

    def __init__(self, host: Host, vault: Vault, global_rank: int) -> None:
        self._host, self._vault, self._global_rank = host, vault, global_rank
        self._states = {s.name: s for o in host.operators for s in o.params}

    def held(self, iteration: int) -> bool:
        """Whether a sealed frame of this iteration is in the vault."""
        return self._vault.fetch(self._global_rank, str(FrameKey(iteration))) is not None

    def read(self, iteration: int) -> tuple[list[tuple[Piece, torch.Tensor]], frozenset[str]]:
        """A frame's pieces with views of their bytes, and its full operators; verified."""
        entry = self._vault.fetch(self._global_rank, str(FrameKey(iteration)))
        if entry is None:
            raise NothingToRebuildFrom(
                f"the frame of iteration {iteration} of global rank {self._global_rank} is gone"
            )
        pieces = pieces_of(entry.meta)
        return [(p, view(p, entry.data)) for p in pieces], frozenset(entry.meta["full"])

    def load(
        self, iteration: int, wanted: Callable[[str], bool], light: Callable[[str], bool]
    ) -> frozenset[str]:
        """Puts full operators (where `wanted`) and light ones (where `light`) into the model.

        Returns:
            The operators that have full state now.
        """
        pieces, full = self.read(iteration)
        taken = frozenset(name for name in full if wanted(name))
        fresh: dict[str, ParamState] = {}
        with torch.no_grad():
            for piece, data in pieces:
                if piece.operator in taken and piece.part != "light":
                    state = self._states[piece.param]
                    if piece.param not in fresh:
                        self._forget_missing(state, pieces)
                    fresh[piece.param] = state
                    self._put(state, piece, data)
                elif (
                    piece.part == "light"
                    and piece.operator not in (BUFFERS, *taken)
                    and light(piece.operator)
                ):
                    self._states[piece.param].light.copy_(data)
        self._host.publish_main(list(fresh.values()))
        return taken

    def load_buffers(self, iteration: int) -> None:
        """Puts the model buffers of a frame back."""
        buffers = self._host.buffers()
        with torch.no_grad():
            for piece, data in self.read(iteration)[0]:
                if piece.operator == BUFFERS:
                    buffers[piece.param].copy_(data)

    def check(self, iteration: int, active: frozenset[str]) -> None:
        """Compares replayed state with what training captured at the same iteration, bit for bit.

        Raises:
            ReplayDiverged: naming the first tensor that differs.
        """
        buffers = self._host.buffers()
        for piece, data in self.read(iteration)[0]:
            if piece.operator == BUFFERS:
                live = buffers[piece.param]
            elif piece.operator not in active:
                continue
            elif piece.part == "light":
                live = self._states[piece.param].light
            elif piece.part == "main":
                live = self._states[piece.param].main
            else:
                live = self._states[piece.param].states.tensors()[piece.part]
            if not same_bits(live, data):
                raise ReplayDiverged(
                    f"replay of iteration {iteration} gave other bits than training for "
                    f"{piece.part} of {piece.param}; "
                    "are all kernels deterministic (--deterministic-mode)?"
                )

    @staticmethod
    def _forget_missing(state: ParamState, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> None:
        parts = {p.part for p, _ in pieces if p.param == state.name}
        if parts == {"main"}:
            state.states.clear()

    def _put(self, state: ParamState, piece: Piece, data: torch.Tensor) -> None:
        if piece.part == "main":
            state.main.detach().copy_(data)
            return
        live = state.states.tensors().get(piece.part)
        if live is None:
            device = torch.device("cpu") if piece.host else self._host.device
            state.states.put(piece.part, data.clone().to(device))
        else:
            live.copy_(data)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bytes: NaNs with equal bits are equal, zeros of different sign are not."""
    raw = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(raw[0], raw[1])


class Rebuild:
    """One rank's walk through a stage plan.

    `stepped` is called by the optimizer tap after each replayed step.

    Args:
        capture: captures the frame of an iteration, for those that died with the worker.
    """

    def __init__(
        self,
        plan: StagePlan,
        host: Host,
        frames: Frames,
        log: InboxLog,
        capture: Callable[[int], None],
    ) -> None:
        self.plan, self._host, self._frames = plan, host, frames
        self._log, self._capture = log, capture
        self._all = frozenset(o.name for o in host.operators)
        self._full: frozenset[str] = frozenset()

    def load_base(self) -> None:
        """Loads the base frame; afterwards the whole stage has the base's compute weights."""
        base = self.plan.base
        self._host.begin_replay()
        self._full = self._frames.load(base, lambda name: True, lambda name: True)
        self._frames.load_buffers(base)
        self._host.sync_params()
        self._host.freeze(self._all - self._full)

    def start(self, iteration: int) -> None:
        """Puts RNG, scheduler and counters of the start of a replayed iteration in place."""
        state = self._log.read_state(HeaderKey(iteration))
        if state is None:
            raise MissingFromInbox(
                f"replay needs {HeaderKey(iteration)}, which is not in this rank's log"
            )
        self._host.load_start_state(state)

    def stepped(self, iteration: int) -> None:
        """After a replayed optimizer step: check, convert, capture what is missing."""
        if self._frames.held(iteration):
            self._frames.check(iteration, self._full)
        if iteration <= self.plan.dense_at and self._full != self._all:
            full = self._full
            new = self._frames.load(iteration, lambda n: n not in full, lambda n: n not in full)
            self._full = full | new
            self._host.sync_params()
            self._host.freeze(self._all - self._full)
        if not self._frames.held(iteration):
            self._capture(iteration)

    def done(self) -> None:
        """Everything has full state again: back to the host's own communication settings."""
        if self._full != self._all:
            raise NothingToRebuildFrom(
                f"{sorted(self._all - self._full)[0]} has no full state after the replay"
            )
        self._host.end_replay()
