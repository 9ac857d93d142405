"""A frame counts when what it is of counts, and only whole windows are spilled."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from one_rank import Rank

from megatron_moetion.capturing import Capturing
from megatron_moetion.config import Config, Cut
from megatron_moetion.inbox.key import FrameKey
from megatron_moetion.inbox.tap import Mode
from megatron_moetion.operators import GradientAccess, Kind, Operator, ParamState, StateAccess
from megatron_moetion.steering import Options, Steering
from megatron_moetion.vault.spill import Span

KEY = str(FrameKey(5))


class Host:
    """Two operators, as frames see them."""

    device = torch.device("cpu")

    def __init__(self, cut: Cut) -> None:
        self.operators = [self._operator(name, cut == "shard") for name in ("a", "b")]

    @staticmethod
    def _operator(name: str, gradients: bool) -> Operator:
        main = torch.randn(8)
        main.grad = torch.ones(8)
        param = torch.nn.Parameter(main.bfloat16())
        gradient = GradientAccess(main, "grad") if gradients else None
        access = StateAccess({}, main)
        state = ParamState(name, param, param.detach(), main, access, gradient)
        return Operator(name, Kind.EXPERT, [state], 8)

    def buffers(self) -> dict[str, torch.Tensor]:
        return {"bias": torch.zeros(2)}


class Frames:
    """A rank that captures, with windows of two frames."""

    def __init__(self, cut: Cut, **flags: Any) -> None:
        host, flags = Host(cut), {"window": 2, **flags}
        options = Options.of(Config(cut=cut, **flags))
        steering = Steering(host.operators, 8, options, None, False, host.device)
        self.rank = Rank(cut, host, steering, **flags)
        self.vault, self.places = self.rank.job.vault, list[str]()
        self.capturing = Capturing(self.rank.worker, self.places.append)

    def sealed(self) -> list[str]:
        return sorted(entry.key for entry in self.vault.inventory(0, "frame/"))

    def offered(self) -> list[Any]:
        return [told["span"] for told in self.rank.leader.heard("window")]


def test_by_stage_a_frame_counts_at_once() -> None:
    frames = Frames("stage")
    frames.capturing.capture(5)
    assert (frames.sealed(), frames.places) == ([KEY], ["capture"])


def test_by_shard_a_frame_counts_once_the_training_step_has_returned() -> None:
    frames = Frames("shard")
    frames.capturing.capture(5)
    assert frames.sealed() == []
    frames.capturing.returned()
    assert frames.sealed() == [KEY]


def test_by_shard_the_frame_of_a_step_that_did_not_return_is_dropped() -> None:
    frames = Frames("shard")
    frames.capturing.capture(5)
    frames.capturing.begin(5)
    frames.capturing.returned()
    assert frames.sealed() == []
    frames.capturing.capture(5)
    frames.capturing.returned()
    assert frames.sealed() == [KEY]


@pytest.mark.parametrize("stepped", [False, True])
def test_a_frame_says_whether_there_was_an_update(stepped: bool) -> None:
    frames = Frames("stage")
    frames.capturing.stepped = stepped
    frames.rank.cursor.mode = Mode.REPLAY
    frames.capturing.capture(5)
    entry = frames.vault.fetch(0, KEY)
    assert entry is not None
    assert entry.meta["stepped"] is stepped


def test_only_windows_that_are_whole_on_this_node_are_offered() -> None:
    frames = Frames("stage", spill_interval=1)
    frames.capturing.complete_behind = 3
    for iteration in range(1, 9):
        frames.capturing.offer_window(iteration)
        frames.capturing.offer_window(iteration)
    assert frames.offered() == [asdict(Span(5, 6)), asdict(Span(7, 8))]


def test_without_an_interval_nothing_is_offered() -> None:
    frames = Frames("stage")
    for iteration in range(1, 9):
        frames.capturing.offer_window(iteration)
    assert frames.offered() == []
