"""What the core asks of the training framework.

Implemented in `patches/`, the only place that knows Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_moetion.operators import Operator, ParamState


@dataclass(frozen=True)
class Routing:
    """The experts of this rank as the routers of its stage see them.

    Attributes:
        places: by operator name, where its load stands in a tensor of `shape`.
        shape: (routers of this stage, experts of each).
        group: all ranks of this stage.
        capacity: tokens that an expert takes in an iteration at most, from all ranks of the stage.
    """

    places: Mapping[str, tuple[int, int]]
    shape: tuple[int, int]
    group: Any
    capacity: float


State = dict[str, Any]
"""Nested containers of tensors and scalars that `snapshot.bundle` can write."""


class Host(Protocol):
    """One rank's view of the training program.

    Nothing here decides anything; a method either reads, writes, or runs one step of the host.
    """

    operators: Sequence[Operator]
    device: torch.device

    def buffers(self) -> Mapping[str, torch.Tensor]:
        """Model buffers by canonical name; live, not copies."""

    def inbox(self) -> Mapping[str, tuple[int, int]]:
        """At most what this rank logs in one iteration, by kind of entry: how many, and the bytes
        of each.
        """

    def iteration_flops(self) -> float:
        """Floating-point operations of this rank in one iteration, on average over all ranks."""

    def start_state(self) -> State:
        """State at an iteration's start that is no parameter, optimizer tensor or buffer."""

    def load_start_state(self, state: State) -> None:
        """Puts `start_state` back, RNG included."""

    def load_loop_state(self, state: State) -> None:
        """Gives a replacement's training loop the running sums and counters of `start_state`."""

    def live_state(self) -> State:
        """`start_state` plus what only a nested replay would disturb (timers)."""

    def load_live_state(self, state: State) -> None:
        """Puts `live_state` back after a nested replay."""

    def interlude_state(self) -> State:
        """All that an interlude may change in this process; not for a log."""

    def load_interlude_state(self, state: State) -> None:
        """Puts `interlude_state` back, wherever an interlude was left; collective-free."""

    def take_over(self, state: State) -> None:
        """`load_start_state`, and parameters are gathered when they were then; collective-free."""

    def run_step(self, iteration: int) -> Any:
        """Runs the host's training step of `iteration` once more; returns what it returns."""

    def reset_after_abort(self) -> None:
        """Forgets half-done communication and gradients of an iteration that was given up."""

    def routing(self) -> Routing | None:
        """None where this stage has no experts."""

    def count_loads(self) -> None:
        """From now on, counts what routers send to each expert; starts at zero."""

    def take_load(self) -> torch.Tensor | None:
        """What was counted since `count_loads` or the last call: float32, shape `Routing.shape`,
        on the training device; None where nothing is counted. The caller's own.
        """

    def begin_replay(self) -> None:
        """Switches overlap of communication off; collective-free."""

    def end_replay(self) -> None:
        """Puts overlap back and thaws everything."""

    def freeze(self, names: frozenset[str]) -> None:
        """Makes exactly these operators frozen: forward and input gradient only."""

    def drop_frozen_gradients(self) -> None:
        """Called before the inner optimizer steps in replay: frozen operators are not updated."""

    def update(self, state: State) -> None:
        """Makes one update of the optimizers, under the settings in a `start_state`, with the
        gradients that are in place; parameters without one are passed.
        """

    def publish_main(self, states: Sequence[ParamState]) -> None:
        """Copies FP32 main shards into the compute weights, rounding as the host does."""

    def sync_params(self) -> None:
        """Parameter all-gather inside the stage; collective over the stage."""
