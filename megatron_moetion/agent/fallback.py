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

VARIABLE = "MOETION_FALL_BACK"


@dataclass(frozen=True)
class FallBack:
    """Why an agent begins again.

    Attributes:
        iteration: of the newest spill that was valid on all nodes; each one is newer than the one
            before, or the job ends: it would only fail again.
        fired: scripted faults that have been injected, by index.
    """

    iteration: int
    fired: tuple[int, ...] = ()


def inherited() -> FallBack | None:
    """What this process began again for, if it did; no child sees it."""
    told = os.environ.pop(VARIABLE, None)
    if told is None:
        return None
    iteration, fired = json.loads(told)
    return FallBack(iteration, tuple(fired))


def begin_again(fall_back: FallBack) -> NoReturn:
    """Run this command from its beginning, as the same process; all children must have ended."""
    os.environ[VARIABLE] = json.dumps([fall_back.iteration, fall_back.fired])
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
