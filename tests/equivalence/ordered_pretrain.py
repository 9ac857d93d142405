"""The demo's script where one rank's experts change places in popularity, and no other's do: what
routers really do differs from one machine to the next.

From $MOETION_TEST_TURN=RANK:ITERATION on, that rank's experts are asked for the other way round.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import torch

from megatron_moetion.steering import Steering

TURNS, SINCE = map(int, os.environ["MOETION_TEST_TURN"].split(":"))


def loaded(steering: Steering, iteration: int, load: torch.Tensor | None) -> None:
    if load is not None:
        assert steering._routing is not None
        places = [place for _, place in sorted(steering._routing.places.items())]
        if int(os.environ["RANK"]) == TURNS and iteration >= SINCE:
            places.reverse()
        load.zero_()
        for tokens, place in enumerate(places, start=1):
            load[place] = tokens
    by_itself(steering, iteration, load)


by_itself, Steering.loaded = Steering.loaded, loaded  # type: ignore[method-assign]
root = Path(__file__).parents[2]
runpy.run_path(str(root / "launch" / "demo" / "pretrain_moe.py"), run_name="__main__")
