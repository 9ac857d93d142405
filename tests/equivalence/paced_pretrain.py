"""The demo's script with measurements from a script: how long iterations take and how much of a
frame can be copied meanwhile, from which iteration on, in $MOETION_TEST_PACE as
ITERATION:SECONDS:BYTES,...
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from megatron_moetion.steering import Agreement, Steering
from megatron_moetion.window import Pace, Rates

STEPS = [tuple(map(float, step.split(":"))) for step in os.environ["MOETION_TEST_PACE"].split(",")]


class ScriptedPace(Pace):
    """What is measured in iteration `iteration`."""

    iteration = 0

    def rates(self) -> Rates | None:
        reached = [step for step in STEPS if step[0] <= self.iteration]
        if not reached:
            return None
        _, seconds, nbytes = reached[-1]
        return Rates(seconds, nbytes / seconds)


def decide(steering: Steering, iteration: int, agree: Agreement) -> str | None:
    steering.pace = ScriptedPace()
    steering.pace.iteration = iteration
    return by_itself(steering, iteration, agree)


by_itself, Steering.decide = Steering.decide, decide  # type: ignore[method-assign]
root = Path(__file__).parents[2]
runpy.run_path(str(root / "launch" / "demo" / "pretrain_moe.py"), run_name="__main__")
