"""The demo's script, which leaves when it is told to: at SIGUSR1 with code 0, at SIGUSR2 by an
exception, wherever it is in Python.
"""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path
from typing import Any

AT_LAST_SECONDS = 3.0
"""An exception may come where none gets out, as in a destructor. Then it is an exit, so much later.
"""


class Leaving(Exception):
    """Somebody has asked for it."""


def leave(*signal_and_frame: Any) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, AT_LAST_SECONDS)
    raise Leaving


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
    signal.signal(signal.SIGUSR2, leave)
    script = Path(__file__).parents[2] / "launch" / "demo" / "pretrain_moe.py"
    runpy.run_path(str(script), run_name="__main__")
