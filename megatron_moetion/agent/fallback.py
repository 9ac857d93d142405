"""One tier down: what cannot be rebuilt in memory starts anew from the newest spill.

The agents replace themselves, so that nothing of the failed run is left: no thread, no socket, no
memory. They meet again and start from the spill as after any cold start.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

from megatron_moetion.agent.escalation import NOTHING_TRIED, Tried

VARIABLE = "MOETION_FALL_BACK"


@dataclass(frozen=True)
class FallBack:
    """Why an agent begins again.

    Attributes:
        iteration: of the newest spill that was valid on all nodes; each one is newer than the one
            before, or the job ends: it would only fail again.
        fired: scripted faults that have been injected, by index.
        node_rank: of an agent that stood by when it was started and has had a place since; None
            leaves it to the command line.
        tried: against failures so far, in times of the clock that all processes of a host share.
    """

    iteration: int
    fired: tuple[int, ...] = ()
    node_rank: int | None = None
    tried: Tried = NOTHING_TRIED


def way_on(spilled: int | None, protected: bool) -> str:
    """What is intact when a job ends, for the end of the line that says why.

    Args:
        spilled: iteration of the newest spill that is valid on every node, if there is one.
        protected: the job had --moetion.
    """
    if spilled is not None:
        return f"; the same command goes on from the spill of iteration {spilled}"
    return "; restart from a Megatron checkpoint with --load, or afresh" if protected else ""


def inherited() -> FallBack | None:
    """What this process began again for, if it did; no child sees it."""
    told = os.environ.pop(VARIABLE, None)
    if told is None:
        return None
    iteration, fired, node_rank, tried = json.loads(told)
    return FallBack(iteration, tuple(fired), node_rank, Tried.from_json(tried))


def begin_again(fall_back: FallBack) -> NoReturn:
    """Run this command from its beginning, as the same process; all children must have ended."""
    tried = fall_back.tried.to_json()
    told = [fall_back.iteration, fall_back.fired, fall_back.node_rank, tried]
    os.environ[VARIABLE] = json.dumps(told)
    run_again()


def run_again() -> NoReturn:
    """Run this command from its beginning, as the same process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
