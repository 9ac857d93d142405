"""Whatever the schedule, the order, the sizes and the failure: a plan exists, and walking it puts
every element of full state into the model exactly once, out of a sealed frame.

What is written is observed below the code that writes it. Tensors that have no elements of the
shard (Adam's step counter) travel with every part and are written with each.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_rebuild import planned, rebuild, same
from tiny_host import Run, TinyHost
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moetion.inbox.key import FrameKey
from megatron_moetion.operators import Kind
from megatron_moetion.parts import Part
from megatron_moetion.recovery.rebuild import Frames, Parts, same_bits
from megatron_moetion.schedule import Schedule, Unit, WindowPolicy, generate, order
from megatron_moetion.vault import LocalVault

MANY = settings(max_examples=150, deadline=None)
SHARDS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=2), min_size=1, max_size=6)


class Writes(TorchDispatchMode):
    """Counts how often each element of each storage is copied into."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, int]] = Counter()
        self._alive: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            target = args[0]
            first = target.storage_offset()
            # The pointer of a storage that is gone may be given out again.
            self._alive.append(target)
            for element in range(first, first + target.numel()):
                self.counts[target.untyped_storage().data_ptr(), element] += 1
        return func(*args, **(kwargs or {}))

    def into(self, tensor: torch.Tensor) -> torch.Tensor:
        """By element of a tensor that owns its storage."""
        where = tensor.untyped_storage().data_ptr()
        return torch.tensor([self.counts[where, e] for e in range(tensor.numel())])


class Watched(Frames):
    """Frames that add up what they write.

    Attributes:
        restored: by parameter and tensor, how often each element was written.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.host, run.vault, 0)
        self._operators = run.host.operators
        self.restored: dict[tuple[str, str], torch.Tensor] = {}

    def load(self, iteration: int, loaded: Parts) -> frozenset[Part]:
        with Writes() as writes:
            parts = super().load(iteration, loaded)
        for state in (state for operator in self._operators for state in operator.params):
            for name, live in [("main", state.main), *state.states.tensors().items()]:
                if live.shape == state.main.shape:
                    key, found = (state.name, name), writes.into(live)
                    self.restored[key] = self.restored.get(key, torch.zeros_like(found)) + found
        return parts


@dataclass(frozen=True)
class Case:
    """A run that is killed.

    Attributes:
        shards: by operator and parameter, elements on this rank.
        schedules: the first one, and another one from some window's edge on.
        last: the last iteration that counts as done.
        unsealed: whether its frame died with the worker.
    """

    shards: list[list[int]]
    schedules: list[Schedule]
    last: int
    unsealed: bool


@st.composite
def schedules(draw: st.DrawFn, num_operators: int, first: int) -> Schedule:
    kinds, numels, heat = (
        draw(st.lists(values, min_size=num_operators, max_size=num_operators))
        for values in (st.sampled_from(list(Kind)), st.integers(0, 40), st.floats(0, 1))
    )
    units = [Unit(f"o{i}", kinds[i], numels[i]) for i in range(num_operators)]
    ordered = order(units, {u.name: h for u, h in zip(units, heat, strict=True)})
    window, split = draw(st.integers(1, 6)), draw(st.integers(0, 12))
    return generate(ordered, window, draw(st.sampled_from(list(WindowPolicy))), split, first)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shards = draw(SHARDS)
    begun = [draw(schedules(len(shards), 1))]
    if draw(st.booleans()):
        edge = 1 + begun[0].window * draw(st.integers(1, 3))
        begun.append(draw(schedules(len(shards), edge)))
    last = draw(st.integers(1, begun[-1].first + 3 * begun[-1].window))
    return Case(shards, begun, last, draw(st.booleans()))


def run_of(case: Case) -> Run:
    run = Run(TinyHost(case.shards), case.schedules[0], LocalVault(0))
    run.schedules = case.schedules
    run.train(1, case.last)
    if case.unsealed:
        known, run.vault = run.vault, LocalVault(0)
        for listing in known.inventory(0, "frame/"):
            entry = known.fetch(0, listing.key)
            assert entry is not None
            if listing.key != str(FrameKey(case.last)):
                run.vault.put(listing.key, entry.data, entry.meta)
    return run


def cut_otherwise() -> Case:
    """The second schedule cuts an operator into thirds of which one half is loaded by then."""
    halves, thirds = ([Part("o0", k, n) for k in range(n)] for n in (2, 3))
    other = Part("o1")
    old = Schedule(WindowPolicy.ROLLING, ((halves[0],), (halves[1], other)))
    new = Schedule(WindowPolicy.ROLLING, (*((third,) for third in thirds), (other,)), first=5)
    return Case([[8], [3]], [old, new], 7, False)


@MANY
@given(cases())
@example(cut_otherwise())
def test_every_element_of_full_state_is_restored_exactly_once_from_a_sealed_frame(
    case: Case,
) -> None:
    run = run_of(case)
    before = run.host.everything()
    run.host.forget_everything()
    frames, plan = Watched(run), planned(run, case.last)
    rebuild(run, plan, frames)
    torch.set_rng_state(before["rng"])
    assert same(run.host.everything(), before)
    stepped = plan.base > 0
    for state in (state for operator in run.host.operators for state in operator.params):
        for name in ("main", "exp_avg") if stepped else ("main",):
            assert frames.restored[state.name, name].eq(1).all(), (state.name, name)


def test_a_capture_that_was_lost_is_made_again_bit_for_bit() -> None:
    whole = generate([Unit("o0", Kind.LAYER, 9)], 3, WindowPolicy.ROLLING, split=3)
    kept, lost = (run_of(Case([[9]], [whole], 8, unsealed)) for unsealed in (False, True))
    lost.host.forget_everything()
    rebuild(lost, planned(lost, 8))
    first, again = (Frames(run.host, run.vault, 0).read(8) for run in (kept, lost))
    assert first[1] == again[1]
    assert all(same_bits(a, b) for (_, a), (_, b) in zip(first[0], again[0], strict=True))
