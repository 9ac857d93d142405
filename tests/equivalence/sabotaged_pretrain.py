"""The demo's script with one thing broken in replay, named by $MOETION_TEST_SABOTAGE
(comma-separated).
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import torch

from megatron_moetion import capturing, interlude, replaying
from megatron_moetion.inbox import tap
from megatron_moetion.recovery import rebuild


def skip_iteration() -> None:
    """The first replayed iteration is converted, but not run."""
    run_again = replaying.Replay._run_again

    def skipping(self: Any, iteration: int) -> Any:
        if iteration > self._stage.base + 1:
            return run_again(self, iteration)
        self._rebuild.start(iteration)
        self._rebuild.stepped(iteration)
        return None

    replaying.Replay._run_again = skipping  # type: ignore[method-assign]  # that is the point


def stale_frame() -> None:
    """The light weights of the base are those of the frame before."""
    load_base = rebuild.Rebuild.load_base

    def stale(self: Any) -> None:
        load_base(self)
        pieces = self._frames.read(self.plan.base - 1).pieces
        with torch.no_grad():
            self._frames.load_light(pieces, self._loaded)
        self._host.sync_params()

    rebuild.Rebuild.load_base = stale  # type: ignore[method-assign]  # that is the point


def local_norm() -> None:
    """In replay the gradient norm of the stage stands in for that of the job."""
    feed = tap.CollectiveTap._feed

    def local(self: Any, key: Any, outputs: Any, members: Any) -> bool:
        world = len(members) == self._topology.world_size
        replaying = self._cursor.mode is tap.Mode.REPLAY and not self._cursor.small_talk
        if replaying and world and outputs and outputs[0].is_floating_point():
            return True
        return bool(feed(self, key, outputs, members))

    tap.CollectiveTap._feed = local  # type: ignore[method-assign]  # that is the point


def lost_step() -> None:
    """Adam's step counter is not restored."""
    put = rebuild.Frames._put

    def forgetful(self: Any, state: Any, piece: Any, data: Any, gaps: Any) -> None:
        put(self, state, piece, data.zero_() if piece.tensor == "step" else data, gaps)

    rebuild.Frames._put = forgetful  # type: ignore[method-assign]  # that is the point


def lost_buffer() -> None:
    """Model buffers (the router's bias) are not restored."""
    rebuild.Frames.load_buffers = lambda self, iteration: None  # type: ignore[method-assign]  # that is the point


def lost_frames() -> None:
    """Rank 2 captures the starting state and nothing after it."""
    capture = capturing.Capturing._capture

    def forgetful(self: Any, iteration: int, plan: Any) -> None:
        if iteration == 0 or self._job.global_rank != 2:
            capture(self, iteration, plan)

    capturing.Capturing._capture = forgetful  # type: ignore[method-assign]  # that is the point


def no_check() -> None:
    """The replay's own comparison with the frames is off, so that only the digests can tell."""
    rebuild.Frames.check = lambda self, iteration, loaded: None  # type: ignore[method-assign]  # that is the point


def late_validation() -> None:
    """Where an evaluation is not done again, the validation data stand one batch too early."""
    move_on = interlude._Stay.move_on

    def late(self: Any, used: Any) -> None:
        move_on(self, [max(count - 1, 0) for count in used])

    interlude._Stay.move_on = late  # type: ignore[method-assign]  # that is the point


for name in filter(None, os.environ.get("MOETION_TEST_SABOTAGE", "").split(",")):
    globals()[name]()

if __name__ == "__main__":
    script = Path(__file__).parents[2] / "launch" / "demo" / "pretrain_moe.py"
    runpy.run_path(str(script), run_name="__main__")
