"""The demo's script where one rank is slow: in an iteration, though for less than the limit for
hangs, in an evaluation and while it saves, for more than that.

The agents tell the limit in their events; they tell it again when it has changed by `MUCH`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_moetion import events
from megatron_moetion.agent.hangs import MUCH
from megatron_moetion.session import Session

SCRIPT = Path(__file__).parents[2] / "launch" / "demo" / "pretrain_moe.py"
SLOW_RANK, SLOW_ITERATION = 1, 54
PAUSE = "pause"
"""Kind of the event of each pause."""


def pause(session: Session, what: str, part_of_limit: float) -> None:
    if session.job.global_rank != SLOW_RANK:
        return
    told = [e for e in events.read(session.job.config.dir) if e["kind"] == "hang-limit"]
    seconds = part_of_limit * told[-1]["seconds"]
    session.job.events.emit(PAUSE, what=what, seconds=seconds, limit=told[-1]["seconds"])
    time.sleep(seconds)


def slow(what: str, once: list[str], host: Callable[..., Any]) -> Callable[..., Any]:
    def slowly(*args: Any, **kwargs: Any) -> Any:
        if what not in once and sessions:
            once.append(what)
            pause(sessions[-1], what, MUCH)
        return host(*args, **kwargs)

    return slowly


def reached(self: Session, place: str, microbatch: int | None = None) -> None:
    sessions[:] = [self]
    by_itself(self, place, microbatch)
    if (place, microbatch, self.position.iteration) == ("forward", 1, SLOW_ITERATION):
        pause(self, "an iteration", 1 / MUCH)


sessions: list[Session] = []
by_itself, Session.reached = Session.reached, reached  # type: ignore[method-assign]


def main() -> None:
    """Trains."""
    from megatron.training import training

    once: list[str] = []
    training.evaluate = slow("evaluation", once, training.evaluate)
    training.save_checkpoint = slow("saving", once, training.save_checkpoint)
    # In this file's name, as in `demo_pretrain.py`.
    exec(compile(SCRIPT.read_text(), SCRIPT, "exec"), globals())


if __name__ == "__main__":
    main()
