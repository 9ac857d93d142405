"""Carries a plan out on a job that trains: kills from outside, then waits for the recovery."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megatron_moetion import events
from megatron_moetion.agent.escalation import Tier
from tests.equivalence.harness import follow, kill_workers

from .plan import KINDS, Failure

ITERATION = re.compile(r" iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+)")


class RunEnded(Exception):
    """The job ended by itself, or made no progress."""


@dataclass(frozen=True)
class Outcome:
    """What came of a failure.

    Attributes:
        iteration: whose log line was the last one before it.
        epochs: that its recovery took, first and last.
        ms: from its detection to training, as the leader counts.
        tier: that was tried last, as the leader names it.
        second_came: whether the second failure was injected before training went on.
    """

    failure: Failure
    iteration: int
    epochs: tuple[int, int]
    ms: float
    tier: str
    second_came: bool


@dataclass
class Injector:
    """Injects failures until the time is up or there are enough, then has the job end.

    Args:
        plan: what to inject.
        most: how many.
        seconds: after which no other one is begun.
        stall_seconds: the job counts as hanging if it has said nothing for so long.
        say: a line for whoever watches.
        not_survived: the kind of the failure that the job ended with.
        why_not: why the job ended, if not by this.
    """

    plan: Iterator[Failure]
    most: int
    seconds: float
    stall_seconds: float
    say: Callable[[str], None]
    outcomes: list[Outcome] = field(default_factory=list)
    not_survived: list[str] = field(default_factory=list)
    why_not: str = ""
    _heard: threading.Event = field(default_factory=threading.Event)
    _ms: list[float] = field(default_factory=list)
    _over: bool = False

    def __call__(self, directory: Path) -> None:
        """Runs beside the job, as `meddle` of `Runner.run`."""
        watching = threading.Thread(target=self._watch, args=(directory,))
        watching.start()
        try:
            self._inject(directory)
        except RunEnded as ended:
            # Whoever watches for a stall was first, if it was one.
            self.why_not = self.why_not or str(ended)
        finally:
            self._over = True
            self._heard.set()
            watching.join()
            end(directory)

    def _watch(self, directory: Path) -> None:
        while self._heard.wait(self.stall_seconds):
            if self._over:
                return
            self._heard.clear()
        self.why_not = f"nothing was heard for {self.stall_seconds:g} s"
        end(directory)

    def _inject(self, directory: Path) -> None:
        begin, after = time.monotonic(), 0
        while len(self.outcomes) < self.most and time.monotonic() - begin < self.seconds:
            failure = next(self.plan)
            iteration, ms = self._trained(directory, failure.after, after)
            outcome = self._one(directory, failure, iteration, ms)
            self.outcomes.append(outcome)
            took = f"training again after {outcome.ms:.0f} ms"
            missed = "" if outcome.second_came else ", before the second one"
            self.say(f"{len(self.outcomes)}. iteration {iteration}: {failure}: {took}{missed}")
            after = (directory / "log").stat().st_size
        # What the last recovery left has to train, too.
        self._trained(directory, 5, after)

    def _trained(self, directory: Path, iterations: int, after: int) -> tuple[int, float]:
        """Waits for log lines; the last one's iteration and how long one takes usually, in ms: the
        first ones after a failure tell how long the recovery took, too.
        """
        told = follow(directory / "log", after)
        for line in told:
            self._heard.set()
            found = ITERATION.search(line)
            if found is None:
                continue
            self._ms.append(float(found[2]))
            iterations -= 1
            if iterations <= 0:
                told.close()
                return int(found[1]), median(self._ms)
        raise RunEnded("the job ended while it trained")

    def _one(self, directory: Path, failure: Failure, iteration: int, ms: float) -> Outcome:
        (leader,) = (directory / events.FOLDER).glob("agent-0.*")
        told = follow(leader, after=leader.stat().st_size)
        struck: list[int] = []
        _later(failure.delay * ms / 1000, lambda: struck.extend(_strike(directory, failure)))
        pending = _lost_with(failure.node, failure.ranks)
        epochs: list[int] = []
        second, tier = failure.second, str(Tier.LOCALIZED)
        for line in told:
            self._heard.set()
            event = json.loads(line)
            pending -= {_lost(event)}
            if event["kind"] in ("detected", "node-lost"):
                epochs.append(event["epoch"])
            if event["kind"] in ("escalated", "fell-back"):
                tier = event["tier"]
            if second and event["kind"] == failure.event:
                _later(failure.second_seconds, lambda: _strike_again(directory, failure))
                pending |= _lost_with(failure.second_node, second)
                second = ()
            if event["kind"] == "resumed" and not pending:
                told.close()
                if failure.node is not None:
                    _go_on(struck)
                took = (min(epochs), event["epoch"])
                return Outcome(failure, iteration, took, event["ms"], tier, not second)
        self.not_survived.append(failure.kind)
        raise RunEnded(f"the job did not survive {failure}, at iteration {iteration}")


def _lost_with(node: int | None, ranks: Sequence[int]) -> set[tuple[str, int]]:
    """What the leader says of it, see `_lost`."""
    return {("rank", rank) for rank in ranks} if node is None else {("node", node)}


def _lost(event: dict[str, Any]) -> tuple[str, int] | None:
    match event["kind"]:
        case "detected":
            return ("rank", event["global_rank"])
        case "node-lost":
            return ("node", event["node_rank"])
    return None


def _later(seconds: float, then: Callable[[], None]) -> None:
    """Comes at a random instant, which is what a soak is for."""
    timer = threading.Timer(seconds, then)
    timer.start()
    timer.join()


def _strike(directory: Path, failure: Failure) -> list[int]:
    """Sends the signals; who got one."""
    number, known = KINDS[failure.kind].number, _pids(directory)
    pids = [known[rank] for rank in failure.ranks]
    if failure.node is not None:
        # The workers of an agent that is killed go with it.
        agent = _agent(pids[0])
        pids = [agent] if number == signal.SIGKILL else [agent, *pids]
    for pid in pids:
        os.kill(pid, number)
    return pids


def _strike_again(directory: Path, failure: Failure) -> None:
    if failure.second_node is None:
        kill_workers(directory, failure.second)
        return
    known = _pids(directory)
    # The first failure may have been one of its workers'.
    there = [known[rank] for rank in failure.second if rank not in failure.ranks]
    os.kill(_agent(there[0]), signal.SIGKILL)


def _go_on(pids: list[int]) -> None:
    """What was stopped goes on, and is to notice that it has no part in the job any more."""
    for pid in reversed(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _pids(directory: Path) -> dict[int, int]:
    """Of the workers, by global rank."""
    started = [e for e in events.read(directory) if e["kind"] == "started"]
    return {e["global_rank"]: e["pid"] for e in started}


def _agent(worker: int) -> int:
    """Whoever has the place of a node by now: the parent of its workers."""
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def end(directory: Path) -> None:
    """Has the leader end the job, if it has not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((directory / "launcher-0.pid").read_text()), signal.SIGTERM)
