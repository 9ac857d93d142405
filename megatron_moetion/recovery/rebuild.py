"""Rebuilding a failed stage: sparse-to-dense conversion, then catch-up.

Source: paper section 3.3, design section 7.

Runs on every rank of the failed stage in lockstep. Frames base, base+1, ... are loaded one after
the other; in between, the host's own training step runs again from the inbox. An operator without
full state is frozen. One of which some parts are loaded is stepped: its loaded elements are right,
the others are garbage that never leaves them, as the optimizer works element by element, and their
weights are overwritten with the next frame's before they are used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch

from megatron_moetion.host import Host
from megatron_moetion.inbox.key import FrameKey, HeaderKey
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.operators import GRADIENT, LIGHT, ParamState
from megatron_moetion.parts import Part, Stretch, complete, covered, missing, within
from megatron_moetion.recovery.failure import MissingFromInbox, ReplayDiverged
from megatron_moetion.recovery.plan import NothingToRebuildFrom, StagePlan
from megatron_moetion.snapshot.frame import BUFFERS, Piece, not_finite, pieces_of, view
from megatron_moetion.vault import Fetched, Vault

Parts = AbstractSet[Part]


class Frame(NamedTuple):
    """A frame as it was sealed.

    Attributes:
        pieces: each with a view of its bytes.
        full: what is full in it.
        stepped: the optimizer made its update in that iteration.
    """

    pieces: list[tuple[Piece, torch.Tensor]]
    full: frozenset[Part]
    stepped: bool


class Frames:
    """This rank's frames, read back from the vault and put into the live model."""

    def __init__(self, host: Host, vault: Vault, global_rank: int) -> None:
        self._host, self._vault, self._global_rank = host, vault, global_rank
        self._states = {s.name: s for o in host.operators for s in o.params}
        self._newest: tuple[int, Fetched] | None = None
        self.doubted = False
        """Whatever is read is looked through, as what was read before has led to nonsense."""

    def forget(self) -> None:
        """Keeps nothing of the frame that was read last: it may be large, and of another node."""
        self._newest = None

    def _fetch(self, iteration: int) -> Fetched | None:
        """A frame in the vault, which is read there once however often it is asked for in turn.

        Raises:
            CorruptEntry: it is damaged; if frames are `doubted` also when it holds NaN or infinity.
        """
        if self._newest is not None and self._newest[0] == iteration:
            return self._newest[1]
        self.forget()
        entry = self._vault.fetch(self._global_rank, str(FrameKey(iteration)))
        if entry is not None and self.doubted:
            bad = not_finite(pieces_of(entry.meta), entry.data, bool(entry.meta["stepped"]))
            if bad is not None:
                self._vault.distrust(self._global_rank, str(FrameKey(iteration)), bad)
        self._newest = None if entry is None else (iteration, entry)
        return entry

    def held(self, iteration: int) -> bool:
        """Whether a sealed frame of this iteration is in the vault."""
        return self._fetch(iteration) is not None

    def read(self, iteration: int) -> Frame:
        """A frame, verified."""
        entry = self._fetch(iteration)
        if entry is None:
            raise NothingToRebuildFrom(
                f"the frame of iteration {iteration} of global rank {self._global_rank} is gone"
            )
        pieces = pieces_of(entry.meta)
        full = frozenset(Part.from_json(row) for row in entry.meta["full"])
        stepped = bool(entry.meta["stepped"])
        return Frame([(p, view(p, entry.data)) for p in pieces], full, stepped)

    def load(self, iteration: int, loaded: Parts) -> frozenset[Part]:
        """Puts the full parts of a frame into the model, and light weights where no part is loaded.

        Elements of a part in `loaded` are left as they are.

        Returns:
            All parts that are loaded now.
        """
        return self.take(self.read(iteration), loaded)

    def take(self, frame: Frame, loaded: Parts) -> frozenset[Part]:
        """`load` of a frame that was read."""
        done = complete(loaded)
        new = frozenset(part for part in frame.full if part.operator not in done)
        with torch.no_grad():
            self._load_full(frame.pieces, new, loaded)
            self.load_light(frame.pieces, loaded | new)
        return frozenset(loaded | new)

    def _load_full(
        self, pieces: Sequence[tuple[Piece, torch.Tensor]], new: Parts, loaded: Parts
    ) -> None:
        taken, known, fresh = {part.operator for part in new}, _by_operator(loaded), {}
        for piece, data in pieces:
            if piece.operator not in taken or piece.tensor in (LIGHT, GRADIENT):
                continue
            state = self._states[piece.param]
            if piece.param not in fresh:
                self._forget_missing(state, pieces)
            fresh[piece.param] = state
            self._put(state, piece, data, missing(known[piece.operator], state.main.numel()))
        self._host.publish_main(list(fresh.values()))

    def load_light(self, pieces: Sequence[tuple[Piece, torch.Tensor]], loaded: Parts) -> None:
        """Puts the light pieces of a frame into the model, where no part is loaded."""
        known = _by_operator(loaded)
        for piece, data in pieces:
            if piece.tensor == LIGHT and piece.operator != BUFFERS:
                live = self._states[piece.param].light
                for start, end in missing(known[piece.operator], live.numel()):
                    live[start:end].copy_(data[start:end])

    def put_gradients(self, frame: Frame, operators: AbstractSet[str]) -> int:
        """Puts the gradients of some operators in place, and none for all others.

        Returns:
            For how many parameters there is one.
        """
        self.clear_gradients()
        found = [
            (self._states[piece.param], data)
            for piece, data in frame.pieces
            if piece.tensor == GRADIENT and piece.operator in operators
        ]
        for state, data in found:
            assert state.gradient is not None
            state.gradient.put(data.to(self._host.device, copy=True).view(state.main.shape))
        return len(found)

    def clear_gradients(self) -> None:
        """No update has anything to take."""
        for state in self._states.values():
            assert state.gradient is not None
            state.gradient.put(None)

    def load_buffers(self, iteration: int) -> None:
        """Puts the model buffers of a frame back."""
        buffers = self._host.buffers()
        with torch.no_grad():
            for piece, data in self.read(iteration).pieces:
                if piece.operator == BUFFERS:
                    buffers[piece.param].copy_(data)

    def check(self, iteration: int, loaded: Parts) -> None:
        """Compares replayed state with what training captured at the same iteration, bit for bit:
        buffers, and the elements of the parts that are loaded.

        Raises:
            ReplayDiverged: naming the first tensor that differs.
        """
        buffers, known = self._host.buffers(), _by_operator(loaded)
        for piece, data in self.read(iteration).pieces:
            parts = known[piece.operator]
            if piece.operator == BUFFERS:
                same = same_bits(buffers[piece.param], data)
            elif parts:
                same = self._same(self._states[piece.param], piece, data, parts)
            else:
                continue
            if not same:
                raise ReplayDiverged(
                    f"replay of iteration {iteration} gave other bits than training for "
                    f"{piece.tensor} of {piece.param}; "
                    "are all kernels deterministic (--deterministic-mode)?"
                )

    @staticmethod
    def _same(state: ParamState, piece: Piece, data: torch.Tensor, parts: Sequence[Part]) -> bool:
        named = {LIGHT: state.light, "main": state.main}
        live = (
            named[piece.tensor] if piece.tensor in named else state.states.tensors()[piece.tensor]
        )
        if not _by_element(piece, state):
            return same_bits(live, data)
        return all(
            same_bits(a, b) for a, b in _pairs(live, piece, data, covered(parts, live.numel()))
        )

    @staticmethod
    def _forget_missing(state: ParamState, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> None:
        if {p.tensor for p, _ in pieces if p.param == state.name} == {"main"}:
            state.states.clear()

    def _put(
        self, state: ParamState, piece: Piece, data: torch.Tensor, gaps: Sequence[Stretch]
    ) -> None:
        """Copies a piece of full state into the model; by element only where there are `gaps`."""
        if piece.tensor == "main":
            live = state.main.detach()
        else:
            known = state.states.tensors().get(piece.tensor)
            live = self._new(state, piece) if known is None else known
        if not _by_element(piece, state):
            live.copy_(data)
            return
        for target, source in _pairs(live, piece, data, gaps):
            target.copy_(source)

    def _new(self, state: ParamState, piece: Piece) -> torch.Tensor:
        """An optimizer tensor that the worker does not have yet; what is not loaded stays 0."""
        shape = state.main.shape if _by_element(piece, state) else torch.Size(piece.shape)
        device = torch.device("cpu") if piece.host else self._host.device
        live = torch.zeros(shape, dtype=piece.torch_dtype, device=device)
        state.states.put(piece.tensor, live)
        return live


def _by_operator(parts: Parts) -> defaultdict[str, list[Part]]:
    found: defaultdict[str, list[Part]] = defaultdict(list)
    for part in parts:
        found[part.operator].append(part)
    return found


def _by_element(piece: Piece, state: ParamState) -> bool:
    """Whether a piece goes with the elements of the shard; Adam's step counter does not."""
    if piece.tensor == LIGHT or piece.stretch is not None:
        return True
    return piece.shape == tuple(state.main.shape)


def _pairs(
    live: torch.Tensor, piece: Piece, data: torch.Tensor, stretches: Sequence[Stretch]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What of a piece lies in some stretches: views of the live tensor and of the frame."""
    here = piece.stretch or Stretch(0, live.numel())
    whole, held = live.detach().view(-1), data.view(-1)
    for start, end in within(stretches, here):
        yield whole[start:end], held[start - here.start : end - here.start]


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
        self._loaded: frozenset[Part] = frozenset()

    def load_base(self) -> None:
        """Loads the base frame; afterwards the whole stage has the base's compute weights."""
        self._host.begin_replay()
        self._frames.forget()
        self._loaded = self._frames.load(self.plan.base, frozenset())
        self._frames.load_buffers(self.plan.base)
        self._publish()

    def _publish(self) -> None:
        self._host.sync_params()
        self._host.freeze(self._all - {part.operator for part in self._loaded})

    @property
    def _lacking(self) -> frozenset[str]:
        """Operators without full state."""
        return self._all - complete(self._loaded)

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
            self._frames.check(iteration, self._loaded)
        if iteration <= self.plan.dense_at:
            if self._lacking:
                self._loaded = self._frames.load(iteration, self._loaded)
            # Collective over ranks that may need more frames than this one.
            self._publish()
        if not self._frames.held(iteration):
            self._capture(iteration)

    def done(self) -> None:
        """Everything has full state again: back to the host's own communication settings."""
        if self._lacking:
            raise NothingToRebuildFrom(
                f"{sorted(self._lacking)[0]} has no full state after the replay"
            )
        self._frames.forget()
        self._host.end_replay()


def rebuild_shard(host: Host, frames: Frames, log: InboxLog, base: int, at: int) -> int:
    """Rebuilds the state that this rank had after the update of iteration `at`.

    What is in full in a frame is loaded; what was loaded before is updated by the host's own
    optimizer with the gradient that it took in that iteration. Nothing is computed that a kernel
    could compute otherwise a second time, and no other rank is asked for anything.

    Source: design section 10.

    Args:
        base: the iteration of the first frame.

    Returns:
        How many parameters were updated, over all iterations.

    Raises:
        MissingFromInbox: the optimizer's settings of an iteration are not in the log.
        NothingToRebuildFrom: a frame is gone, or an operator is not in full in any of them.
    """
    loaded: frozenset[Part] = frozenset()
    num_updates = 0
    frames.forget()
    for iteration in range(base, at + 1):
        frame = frames.read(iteration)
        anew = complete(frame.full)
        earlier = frozenset(part for part in loaded if part.operator not in anew)
        if iteration > base and frame.stepped:
            state = log.read_state(HeaderKey(iteration))
            if state is None:
                raise MissingFromInbox(f"{HeaderKey(iteration)} is not in this rank's log")
            updated = frozenset(part.operator for part in earlier)
            num_updates += frames.put_gradients(frame, updated)
            host.update(state)
        loaded = frames.take(frame, earlier)
    lacking = frozenset(o.name for o in host.operators) - complete(loaded)
    if lacking:
        raise NothingToRebuildFrom(f"{sorted(lacking)[0]} has no full state at iteration {at}")
    frames.clear_gradients()
    frames.load_buffers(at)
    frames.forget()
    host.publish_main([state for operator in host.operators for state in operator.params])
    return num_updates
