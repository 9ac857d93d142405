"""What the core asks of the training framework.

Implemented in `patches/`, the only place that knows Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_moetion.operators import Operator, ParamState

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

    def run_step(self, iteration: int) -> Any:
        """Runs the host's training step of `iteration` once more; returns what it returns."""

    def reset_after_abort(self) -> None:
        """Forgets half-done communication and gradients of an iteration that was given up."""

    def begin_replay(self) -> None:
        """Switches overlap of communication off; collective-free."""

    def end_replay(self) -> None:
        """Puts overlap back and thaws everything."""

    def freeze(self, names: frozenset[str]) -> None:
        """Makes exactly these operators frozen: forward and input gradient only."""

    def drop_frozen_gradients(self) -> None:
        """Called before the inner optimizer steps in replay: frozen operators are not updated."""

    def publish_main(self, states: Sequence[ParamState]) -> None:
        """Copies FP32 main shards into the compute weights, rounding as the host does."""

    def sync_params(self) -> None:
        """Parameter all-gather inside the stage; collective over the stage."""
