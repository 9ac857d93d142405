"""Other programs on the same cores, and data that comes late: what a job has to bear with."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

BURN = "import os; mine = os.getppid()\nwhile os.getppid() == mine: pass"
"""As long as whoever started it lives, however that ends."""


@dataclass(frozen=True)
class Burst:
    """Foreign load for a while.

    Attributes:
        idle: seconds before it.
        processes: that keep a core busy each.
        seconds: how long.
    """

    idle: float
    processes: int
    seconds: float


def bursts(seed: int, cores: int) -> Iterator[Burst]:
    """Without end: at least every core is busy in each, at most three times over."""
    draw = random.Random(f"bursts {seed}")
    while True:
        yield Burst(draw.uniform(0, 15), draw.randint(cores, 3 * cores), draw.uniform(5, 60))


def delay(seed: int, index: int, validation: bool) -> float:
    """How many seconds a sample takes to load: most none, some long.

    The longest iteration is well below the shortest limit for hangs by default, 30 s. Validation is
    not: a few of its samples may take longer than that together, which is no hang.
    """
    draw = random.Random(f"delay {seed} {index} {validation}")
    chance = draw.random()
    if chance < (1 / 8 if validation else 1 / 300):
        return draw.uniform(2, 15 if validation else 8)
    return draw.uniform(0, 0.1) if chance < 1 / 8 else 0.0


class Burners(AbstractContextManager["Burners"]):
    """Carries bursts out until the end of the block.

    Attributes:
        begun: how many there were.
    """

    def __init__(self, plan: Iterator[Burst]) -> None:
        self.begun = 0
        self._plan = plan
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Burners:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        for burst in self._plan:
            if self._over.wait(burst.idle):
                return
            self.begun += 1
            # Linux shares cores out by sessions: what is foreign is in none of the job's.
            burning = [
                subprocess.Popen([sys.executable, "-c", BURN], start_new_session=True)
                for _ in range(burst.processes)
            ]
            self._over.wait(burst.seconds)
            for each in burning:
                each.kill()
                each.wait()
