"""The demo's script with measurements from a script: how long iterations take and how much of a
frame can be copied meanwhile, by number of iterations, in $MOETION_TEST_PACE as N:SECONDS:BYTES,...
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from megatron_moetion.window import Pace, Rates

STEPS = [tuple(map(float, step.split(":"))) for step in os.environ["MOETION_TEST_PACE"].split(",")]


def rates(self: Pace) -> Rates | None:
    """What the newest step that has been reached says."""
    reached = [step for step in STEPS if step[0] <= len(self._seconds)]
    if not reached:
        return None
    _, seconds, nbytes = reached[-1]
    return Rates(seconds, nbytes / seconds)


Pace.rates = rates  # type: ignore[method-assign]  # that is the point
root = Path(__file__).parents[2]
runpy.run_path(str(root / "launch" / "demo" / "pretrain_moe.py"), run_name="__main__")
